"""Text of a growing answer in pieces: once shown, a piece stays true."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
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
        for kind, part in parts_of(decoder):
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
    """Text of a growing answer, in pieces that add up to the whole: the text before the first stop string.

    The first is the one that is complete first (of two that are at once, the longer): so it does not depend on the
    blocks in which tokens come. A piece never shows what may be the beginning of one.
    """

    def __init__(self, codec: Decoder, stops: Sequence[str] = ()) -> None:
        self._codec, self._stops = codec, stops
        self._ids: list[int] = []
        self._shown = 0
        self.kept: int | None = None  # tokens of the last push up to a stop string's last; None: there is none

    def push(self, ids: list[int], last: bool) -> str:
        """The new piece of text; what more tokens could change waits for them. Sets `kept`."""
        before = len(self._ids)
        self._ids += ids
        # All of it is decoded each time: a token's text can depend on the one before it.
        text = self._codec.decode(self._ids) if last else self._codec.tail.steady(self._codec, self._ids)
        place = self._stop(text)
        if place is not None:
            self.kept = bisect_left(range(len(ids)), True, key=lambda count: self._stops_within(before + count))
            text = text[:place]
        elif not last:
            text = text[:len(text) - max((_begun(text, stop) for stop in self._stops), default=0)]
        piece = text[self._shown:]
        self._shown = max(self._shown, len(text))
        return piece

    def _stop(self, text: str) -> int | None:
        """Where the first stop string begins."""
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop, self._shown)) >= 0]
        return min(found)[1] if found else None

    def _stops_within(self, count: int) -> bool:
        return self._stop(self._codec.decode(self._ids[:count])) is not None


def _begun(text: str, stop: str) -> int:
    """How many letters at the end of a text may be the beginning of a stop string."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def parts_of(decoder: dict[str, Any] | None) -> list[tuple[str, dict[str, Any]]]:
    """Kinds and fields of the decoders of a tokenizer.json, in the order in which they work."""
    if decoder is None:
        return []
    if decoder.get("type") == "Sequence":
        return [part for inner in decoder.get("decoders", []) for part in parts_of(inner)]
    return [(str(decoder.get("type")), decoder)]
