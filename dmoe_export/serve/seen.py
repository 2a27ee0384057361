"""Provisional states as JSON: what a forward did to a block, with the text of each place."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from ..bundle.reader import Bundle
from ..decoding.option import Option
from ..decoding.settings import OPTIONS
from ..decoding.watch import StepSeen
from ..text.codec import TextCodec

_PAIRS = 1 << 16  # pairs of tokens whose text is remembered


class Pieces:
    """The text of each place of a block: of its token, or of the best candidate for a masked place.

    A token's text may depend on the token before it (a blank, the second half of a letter), so pairs are decoded. It is
    for eyes alone: pieces need not add up to the committed text.
    """

    def __init__(self, codec: TextCodec | None) -> None:
        """Without a tokenizer, pieces are token ids."""
        self._codec = codec
        self._piece = lru_cache(_PAIRS)(self._decoded)

    def of(self, ids: Sequence[int], before: int | None = None) -> list[str]:
        """`ids`: token ids, −1 where nothing is known yet (its piece is empty); `before`: the token before the first."""
        pieces = []
        for id_ in ids:
            pieces.append(self._piece(before, id_) if id_ >= 0 else "")
            before = id_ if id_ >= 0 else None
        return pieces

    def _decoded(self, before: int | None, id_: int) -> str:
        if self._codec is None:
            return str(id_)
        first = self._codec.decode([before]) if before is not None else ""
        both = self._codec.decode([before, id_]) if before is not None else ""
        return both[len(first):] if first and both.startswith(first) else self._codec.decode([id_])


class States:
    """The states of one answer, in order; the last token of a block is what the next one's text begins after."""

    def __init__(self, pieces: Pieces) -> None:
        self._pieces, self._block, self._before, self._last = pieces, -1, None, None

    def event(self, seen: StepSeen) -> dict[str, Any]:
        """The fields of `StepSeen` and `pieces`, the text of each place; numbers of four digits."""
        if seen.block != self._block:
            self._block, self._before = seen.block, self._last
        self._last = seen.candidates[-1] if seen.candidates else None
        fields = seen.as_dict()
        return {**fields, "confidence": [round(c, 4) for c in seen.confidence], "seconds": round(seen.seconds, 6),
                "pieces": self._pieces.of(seen.candidates, self._before)}


def model_facts(name: str, bundle: Bundle, options: Sequence[str]) -> dict[str, Any]:
    """What the page needs to know of a model: experts, and the `options` of a request with this bundle's defaults."""
    moe, defaults = bundle.manifest.model.moe, bundle.manifest.decode_defaults
    return {"id": name, "experts": moe.num_experts if moe else None,
            "block_length": bundle.manifest.routing.block_length,
            "options": [_option(asked, defaults) for asked in options]}


def _option(asked: str, defaults: dict[str, Any]) -> dict[str, Any]:
    """`asked`: the name in a request, that of a field of `DecodeSettings` or OpenAI's for it."""
    one = OPTIONS["max_new_tokens" if asked == "max_tokens" else asked]
    kind, choices = _kind(one)
    rule = f" ({one.told.rule.words})" if one.told.rule and kind != "choice" else ""
    return {"name": asked, "group": one.told.group, "help": f"{one.told.meaning}{rule}.", "kind": kind,
            "choices": choices, "default": str(defaults.get(one.name, one.shown))}


def _kind(one: Option) -> tuple[str, list[str]]:
    """integer, number, text, boolean or choice; the choices."""
    if all(isinstance(value, str) for value in one.types):
        return "choice", [str(value) for value in one.types]
    for kind, word in ((bool, "boolean"), (int, "integer"), (float, "number")):
        if kind in one.types:
            return word, []
    return "text", []
