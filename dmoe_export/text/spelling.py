"""What a token by itself adds to a text, in bytes: exact for the decoders that put tokens one behind another."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from .stream import parts_of

_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")
_PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that byte-level tokens show as they are
_OTHERS = [byte for byte in range(256) if byte not in _PRINTED]
_BYTES = {chr(byte): byte for byte in _PRINTED} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}

Change = Callable[[str | bytes], str | bytes]


class TokenBytes:
    """Of a tokenizer's decoder. A blank that a decoder takes off the beginning of a text is in its first token."""

    def __init__(self, decoder: dict[str, Any] | None) -> None:
        """`decoder`: that part of tokenizer.json."""
        self._changes = _changes(decoder)
        self.loses_blank = _loses_blank(decoder)

    def of(self, token: str) -> bytes | None:
        """Of a token by its name; None where the decoder looks at more than one token."""
        if self._changes is None:
            return None
        changed: str | bytes = token
        for change in self._changes:
            changed = change(changed)
        return changed if isinstance(changed, bytes) else changed.encode("utf-8", "surrogatepass")


def _loses_blank(decoder: dict[str, Any] | None) -> bool | None:
    """Whether a text loses one blank that it begins with; None where it may lose more, or else."""
    parts = parts_of(decoder)
    joined = next((i for i, (kind, _) in enumerate(parts) if kind in ("Fuse", "ByteLevel")), None)
    if joined is None:
        return None
    behind = [(kind, part.get("content"), part.get("start"), part.get("stop")) for kind, part in parts[joined + 1:]]
    return {0: False, 1: True if behind == [("Strip", " ", 1, 0)] else None}.get(len(behind))


def _changes(decoder: dict[str, Any] | None) -> list[Change] | None:
    """What is done to a token; None where that is more than a change of each token by itself."""
    parts = parts_of(decoder)
    changes: list[Change] = []
    for number, (kind, part) in enumerate(parts):
        if kind in ("Fuse", "ByteLevel"):  # then there is one text
            changes += [_byte_level] if kind == "ByteLevel" else []
            begins = all(other == "Strip" and not one.get("stop") for other, one in parts[number + 1:])
            return changes if begins else None
        if kind == "Replace" and "String" in part.get("pattern", {}):
            changes.append(_replaced(part["pattern"]["String"], part.get("content", "")))
        elif kind == "Metaspace":
            changes.append(_replaced(part.get("replacement", "▁"), " "))
        elif kind == "ByteFallback":
            changes.append(_fallback)
        else:
            return None
    return changes or None  # without a decoder, blanks join the tokens


def _byte_level(token: str | bytes) -> str | bytes:
    """An added token has letters of its own, and is text."""
    if isinstance(token, bytes) or any(letter not in _BYTES for letter in token):
        return token
    return bytes(_BYTES[letter] for letter in token)


def _fallback(token: str | bytes) -> str | bytes:
    found = _BYTE.fullmatch(token) if isinstance(token, str) else None
    return bytes([int(found[1], 16)]) if found else token


def _replaced(pattern: str, content: str) -> Change:
    return lambda token: token.replace(pattern, content) if isinstance(token, str) else token
