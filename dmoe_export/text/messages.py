"""Chat messages as a template may read them."""

from __future__ import annotations

from typing import Any

from ..errors import RequestError

Message = dict[str, Any]
"""Role and content are texts, or content a list of parts `{"type": "text", "text": …}`; other fields are plain data."""

_MOST_DEPTH = 50
_BETWEEN_PARTS = "\n"  # as other servers join them for templates that take one text


def plain_messages(messages: list[Message]) -> list[Message]:
    """The messages without fields that are None, as transformers gives them to templates; parts are one text, by lines.

    Raises RequestError where role or content is no text, for parts that are none, where half a character (a surrogate)
    is found, and for values that are not plain data.
    """
    plain = []
    for message in map(_joined, messages):
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise RequestError(f"Message {short(message)} needs the texts role and content, or as content parts "
                               "of text.")
        check_plain(message, "Message", message)
        plain.append({key: value for key, value in message.items() if value is not None})
    return plain


def _joined(message: Message) -> Message:
    """With one text where content has parts."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    for part in message["content"]:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise RequestError(f"A message has a part of type {short(kind)}; only parts of type text are taken.")
    return message | {"content": _BETWEEN_PARTS.join(part["text"] for part in message["content"])}


def check_text(text: str) -> None:
    """Raise RequestError for half a character, which no tokenizer takes."""
    if half_character(text):
        raise RequestError(f"Prompt {short(text)} holds half a character (a surrogate), so it is no text.")


def half_character(text: str) -> bool:
    """Whether a text holds a surrogate."""
    return not text.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in text)


def check_plain(value: Any, what: str, whole: Any, depth: int = 0) -> None:
    """Raise RequestError for what is no plain data, as JSON has it. `what` and `whole` stand in the sentence."""
    if depth > _MOST_DEPTH:
        raise RequestError(f"{what} {short(whole)} is nested more than {_MOST_DEPTH} levels deep; give a flatter one.")
    if isinstance(value, str):
        if half_character(value):
            raise RequestError(f"{what} {short(whole)} holds half a character (a surrogate), so it is no text.")
    elif isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise RequestError(f"{what} {short(whole)} has the key {key!r}; keys are texts.")
            check_plain(key, what, whole, depth)
            check_plain(inner, what, whole, depth + 1)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            check_plain(inner, what, whole, depth + 1)
    elif value is not None and not isinstance(value, (int, float)):
        raise RequestError(f"{what} {short(whole)} has a value of type {type(value).__name__}; give texts, "
                           "numbers, lists and objects as JSON has them.")


def short(value: object) -> str:
    """A value as a sentence can show it."""
    try:
        text = ascii(value) if isinstance(value, str) and half_character(value) else repr(value)
    except (ValueError, RecursionError):  # integers of thousands of digits, lists in lists without end
        text = f"of type {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}…"
