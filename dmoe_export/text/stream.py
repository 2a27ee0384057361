"""Text of a growing answer in pieces: once shown, a piece stays true."""

from __future__ import annotations

import re
from typing import Any, Protocol

# Decoders whose text of some tokens begins the text of these and more, but for what `Tail` says.
_STEADY = {"ByteLevel", "ByteFallback", "Fuse", "Metaspace", "WordPiece", "CTC", "Replace", "Strip"}
_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")


class Decoder(Protocol):
    """What a stream needs of a codec."""

    tail: Tail

    def decode(self, ids: list[int]) -> str:
        """Text of token ids."""
        ...

    def token(self, id_: int) -> str | None:
        """A token's name; None for one that decoding leaves out."""
        ...


class Tail:
    """How much of the end of a text may still change when more tokens come; by the kinds of decoders at work."""

    def __init__(self, decoder: dict[str, Any] | None) -> None:
        """`decoder`: that part of tokenizer.json."""
        self.whole = False  # nothing is sure before the end
        self.bytes = False  # a run of byte tokens is read as one: valid as a whole, or not at all
        self.letters = 0  # last letters that a replacement may still join with what comes
        fused = False
        for kind, part in _parts(decoder):
            self.whole |= kind not in _STEADY
            self.bytes |= kind == "ByteFallback"
            if kind == "Replace" and fused:
                pattern = part.get("pattern", {}).get("String")
                self.whole |= pattern is None
                self.letters += max(0, len(pattern or "") - 1)
            fused |= kind in ("Fuse", "ByteLevel")

    def steady(self, codec: Decoder, ids: list[int]) -> str:
        """What is sure of the text of `ids`."""
        if self.whole:
            return ""
        if self.bytes:
            end = len(ids)
            while end and ((name := codec.token(ids[end - 1])) is None or _BYTE.fullmatch(name)):
                end -= 1
            ids = ids[:end]
        text = codec.decode(ids)
        if self.letters:
            text = text[:-self.letters]
        return text.rstrip("\ufffd")  # a letter whose bytes are not all there yet


class TextStream:
    """Text of a growing answer, in pieces that add up to the whole."""

    def __init__(self, codec: Decoder) -> None:
        self._codec = codec
        self._ids: list[int] = []
        self._shown = 0

    def push(self, ids: list[int], last: bool) -> str:
        """The new piece of text; what more tokens could change waits for them."""
        self._ids += ids
        # All of it is decoded each time: a token's text can depend on the one before it.
        text = self._codec.decode(self._ids) if last else self._codec.tail.steady(self._codec, self._ids)
        piece = text[self._shown:]
        self._shown = max(self._shown, len(text))
        return piece


def _parts(decoder: dict[str, Any] | None) -> list[tuple[str, dict[str, Any]]]:
    if decoder is None:
        return []
    if decoder.get("type") == "Sequence":
        return [part for inner in decoder.get("decoders", []) for part in _parts(inner)]
    return [(str(decoder.get("type")), decoder)]
