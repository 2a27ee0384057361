"""Places that a request gives: `template`, `suffix` and `infill` of a body, as parts of a template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..decoding.settings import OPTIONS
from ..decoding.template import Gap, Part
from ..errors import RequestError
from .asked import Shows
from .errors import ApiError
from .schema import Body

_ID_BITS = 63


@dataclass(frozen=True)
class Given:
    """What stands between and behind the places that the model fills in, and what of it the client reads."""

    template: list[Part] | None = None  # of the answer; None: none, or in the prompt, which is a text with gaps
    shows: Shows = "answer"


def too_long(name: str, places: int, most: int, more: str = "") -> ApiError:
    """What a request is told whose answer has more places than the server's may."""
    return ApiError(400, f"{name} makes an answer of {more}{places} places, this server's have at most {most}.",
                    param=name)


def parts_of(name: str, parts: list[Any]) -> list[Part]:
    """The parts of a field of a body: texts, lists of token ids, `{"gap": 8}` or `{"gap": [2, 8]}`; raises ApiError."""
    read = [_part(name, number, part) for number, part in enumerate(parts)]
    if not any(isinstance(part, Gap) for part in read):
        raise ApiError(400, f'{name} has no gap, so nothing is to be filled in; write one as {{"gap": 8}}.', param=name)
    return read


def given_of(body: Body, prompts: Sequence[Any], chat: bool, options: dict[str, Any], most: int) -> Given:
    """What a body gives, for an answer of at most `most` places; raises ApiError.

    Takes those of the request's `options` out that say so: before a suffix, the most new tokens are the gap.
    """
    infill, suffix = getattr(body, "infill", None), getattr(body, "suffix", None) or None
    asked = {"template": body.template, "suffix": suffix, "infill": infill}
    named = [name for name, value in asked.items() if value is not None]
    if len(named) > 1:
        raise ApiError(400, f"{named[0]} and {named[1]} both say what the answer is made of; give one of them.",
                       param=named[1])
    if infill is not None:
        if body.template_kwargs:
            raise ApiError(400, "infill goes through no chat template; leave chat_template_kwargs and tools out.",
                           param="infill")
        if options.get("stop") not in (None, "", []):
            raise ApiError(400, "stop does not go with infill, which says what is behind its gaps; leave it out.",
                           param="stop")
        options["stop"] = []  # whatever the bundle has
        parts = prompts[0]
        _check_places("infill", parts[next(i for i, part in enumerate(parts) if isinstance(part, Gap)):], most)
        return Given(shows="text")
    if suffix is not None:
        if chat:
            raise ApiError(400, "suffix belongs to a prompt that goes through no chat template; give what the answer "
                           "ends with as template.", param="suffix")
        return Given([_gap_of(options), suffix], "gap")
    if body.template is None:
        return Given()
    template = parts_of("template", body.template)
    _check_places("template", template, most)
    return Given(template)


def _check_places(name: str, parts: Sequence[Part], most: int) -> None:
    """As far as they are known before texts are encoded: a few digits can ask for a lot of memory."""
    least = sum(part.places if isinstance(part, Gap) else len(part) for part in parts if not isinstance(part, str))
    if least > most:
        raise too_long(name, least, most, "at least ")


def _gap_of(options: dict[str, Any]) -> Gap:
    places = options.pop("max_new_tokens")
    try:
        OPTIONS["max_new_tokens"].check(places)
        return Gap(places)
    except RequestError as error:
        raise ApiError(400, str(error), param="max_tokens") from None


def _part(name: str, number: int, part: Any) -> Part:
    if isinstance(part, str):
        return part
    if isinstance(part, list) and all(_is_id(one) for one in part):
        return part
    if isinstance(part, dict) and list(part) == ["gap"]:
        return _gap(name, number, part["gap"])
    raise ApiError(400, f'{name}.{number} must be a text, a list of token ids, or a gap, such as {{"gap": 8}}.',
                   param=name)


def _gap(name: str, number: int, value: Any) -> Gap:
    try:
        return Gap(*value) if isinstance(value, list) and len(value) == 2 else Gap(value)
    except RequestError:
        raise ApiError(400, f"{name}.{number} has the gap {str(value)[:50]}, it must be its tokens, at least 1, or "
                       "[fewest, most].", param=name) from None


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value.bit_length() <= _ID_BITS
