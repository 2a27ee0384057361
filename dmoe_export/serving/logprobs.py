"""Probabilities of tokens in the two shapes of OpenAI: of chat completions, and of completions."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Any

from ..decoding.probabilities import Likely, TokenProbability


def of_chat(said: Sequence[TokenProbability] | None) -> dict[str, Any] | None:
    """`logprobs` of a choice of chat completions; None where nobody asked."""
    if said is None:
        return None
    return {"content": [_entry(one) | {"top_logprobs": [_entry(other) for other in one.top]} for one in said],
            "refusal": None}


def _entry(one: Likely) -> dict[str, Any]:
    return {"token": _name(one), "logprob": one.logprob, "bytes": None if one.utf8 is None else list(one.utf8)}


class Columns:
    """`logprobs` of one choice of completions, piece after piece: offsets go on."""

    def __init__(self) -> None:
        self._decoder, self._length = codecs.getincrementaldecoder("utf-8")("replace"), 0

    def of(self, said: Sequence[TokenProbability] | None) -> dict[str, Any] | None:
        """Of the next tokens; None where nobody asked.

        A part of a character is "bytes:\\xe2", as from OpenAI. Of tokens of one name the most probable is in
        `top_logprobs`, which is None without any. Offsets count the characters that are whole before a token.
        """
        if said is None:
            return None
        tops = [_first((_plain(other), other.logprob) for other in one.top) for one in said]
        return {"tokens": [_plain(one) for one in said], "token_logprobs": [one.logprob for one in said],
                "top_logprobs": tops if any(tops) else None,
                "text_offset": [self._offset(one) for one in said]}

    def _offset(self, one: TokenProbability) -> int:
        before = self._length
        self._length += len(_name(one) if one.utf8 is None else self._decoder.decode(one.utf8))
        return before


def _name(one: Likely) -> str:
    """Of a bundle without a tokenizer as vLLM writes it."""
    return f"token_id:{one.token_id}" if one.token is None else one.token


def _first(pairs: Iterable[tuple[str, float | None]]) -> dict[str, float | None]:
    """Of equal names the first value."""
    found: dict[str, float | None] = {}
    for name, value in pairs:
        found.setdefault(name, value)
    return found


def _plain(one: Likely) -> str:
    try:
        if one.utf8:
            one.utf8.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in one.utf8 or b"")
    return _name(one)
