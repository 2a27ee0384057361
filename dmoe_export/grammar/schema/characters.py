"""Sets of characters, and how they are written inside a JSON string: as they are, or by a short escape."""

from __future__ import annotations

import json
from collections.abc import Iterable

from .pieces import Piece, piece

Ranges = tuple[tuple[int, int], ...]
"""Sorted and apart: first and last code point of each."""

EVERY: Ranges = ((0, 0xD7FF), (0xE000, 0x10FFFF))  # halves of surrogate pairs are no characters
ASCII: Ranges = ((0, 0x7F),)
RAW: Ranges = ((0x20, 0x21), (0x23, 0x5B), (0x5D, 0xD7FF), (0xE000, 0x10FFFF))
SHORT = {0x22: '"', 0x5C: "\\", 0x08: "b", 0x0C: "f", 0x0A: "n", 0x0D: "r", 0x09: "t"}


def union(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """All of them, in any order."""
    joined: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if joined and first <= joined[-1][1] + 1:
            joined[-1] = joined[-1][0], max(last, joined[-1][1])
        else:
            joined.append((first, last))
    return tuple(joined)


def common(one: Ranges, other: Ranges) -> Ranges:
    """In both."""
    return union((max(a, c), min(b, d)) for a, b in one for c, d in other if max(a, c) <= min(b, d))


def without(one: Ranges, other: Ranges) -> Ranges:
    """In `one` alone."""
    for first, last in other:
        one = union((a, b) for c, d in one for a, b in ((c, min(d, first - 1)), (max(c, last + 1), d)) if a <= b)
    return one


def written(characters: Ranges) -> Piece | None:
    """One of them in a JSON string; None where none can be: control characters that have no short escape."""
    raw = common(characters, RAW)
    short = [escape for code, escape in SHORT.items() if any(first <= code <= last for first, last in characters)]
    ways = []
    if raw:
        ways.append("[" + "".join(f"\\x{{{first:X}}}" + (f"-\\x{{{last:X}}}" if last > first else "")
                                  for first, last in raw) + "]")
    if short:
        ways.append("\\\\[" + "".join(f"\\{one}" if one in '\\"' else one for one in short) + "]")
    if not ways:
        return None
    return piece(ways[0] if len(ways) == 1 else f"(?:{'|'.join(ways)})")


def quoted(text: str) -> str:
    """A text as one JSON string, as `json.dumps` writes it without `ensure_ascii`; half a surrogate pair is escaped."""
    return json.dumps(text, ensure_ascii=any(0xD800 <= ord(one) < 0xE000 for one in text))
