"""What clients send as prompts, as `Generator.request` takes it."""

from __future__ import annotations

from typing import Any

from .errors import ApiError
from .infill import parts_of
from .schema import MOST_PROMPTS, ChatBody, CompletionBody, DenoisingBody

ROLES = ("system", "developer", "user", "assistant")
_FIELDS = ("role", "content", "name")


def messages_of(body: ChatBody | DenoisingBody) -> list[dict[str, Any]]:
    """Messages for the template: developer is OpenAI's newer word for system, and no template here knows it.

    Contents are checked where all messages are (text/messages.py). Other fields may be there if they say nothing.
    """
    return [_message(number, message) for number, message in enumerate(body.messages or [])]


def _message(number: int, message: dict[str, Any]) -> dict[str, Any]:
    role = message.get("role")
    if role not in ROLES:
        shown = repr(role)[:50]
        raise ApiError(400, f"messages.{number} has the role {shown}, it must be one of {', '.join(ROLES)}.",
                       param="messages")
    for name, value in message.items():
        if name not in _FIELDS and value not in (None, []):
            raise ApiError(400, f"messages.{number} has the field {name[:50]}, which is not offered here.",
                           param="messages")
    kept = {name: value for name, value in message.items() if name in _FIELDS}
    return kept | {"role": "system" if role == "developer" else role}


def prompts_of(body: CompletionBody) -> list[Any]:
    """Prompts of a completion: one text, one list of token ids, or a list of either; or the parts of its `infill`."""
    if body.infill is not None:
        return [parts_of("infill", body.infill)]
    prompt = body.prompt
    one = isinstance(prompt, str) or (isinstance(prompt, list) and prompt and _is_id(prompt[0]))
    prompts = [prompt] if one else prompt
    if not isinstance(prompts, list) or not prompts or not all(_is_prompt(each) for each in prompts):
        raise ApiError(400, "prompt must be a text, a list of token ids, or a list of either.", param="prompt")
    if len(prompts) * body.choices > MOST_PROMPTS:
        raise ApiError(400, f"{len(prompts)} prompts of {body.choices} choices are more than {MOST_PROMPTS} answers; "
                       "give fewer at a time.", param="prompt")
    return prompts


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_prompt(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(map(_is_id, value)))
