"""Members of JSON objects and elements of arrays, as regular expressions."""

from __future__ import annotations

from collections.abc import Sequence

from .characters import quoted
from .pieces import EMPTY, Piece, either, listed, literal, piece, repeated, sequence

SEPARATOR, COLON = piece(", ?"), piece(": ?")  # with a space behind it, as json.dumps writes, or without


def member(name: str, value: Piece) -> Piece:
    """A property and its value."""
    return sequence(literal(quoted(name)), COLON, value)


def members(parts: Sequence[tuple[Piece, bool]], empty: bool) -> Piece:
    """Of an object, in this order: each with whether it must be there; `empty`: none may be, too."""
    must = [i for i, (_, needed) in enumerate(parts) if needed]
    if not must:
        return repeated(_some([part for part, _ in parts]), 0, 1) if empty else _some([part for part, _ in parts])
    before = [repeated(sequence(part, SEPARATOR), 0, 1) for part, _ in parts[:must[0]]]
    behind = [repeated(sequence(SEPARATOR, part), int(needed), 1) for part, needed in parts[must[0] + 1:]]
    return sequence(*before, parts[must[0]][0], *behind)


def _some(parts: Sequence[Piece]) -> Piece:
    """At least one of them; in halves, as every way to begin would write them all again."""
    if len(parts) < 2:
        return parts[0]
    half = len(parts) // 2
    left, right = _some(parts[:half]), _some(parts[half:])
    return either([sequence(repeated(sequence(left, SEPARATOR), 0, 1), right), left])


def elements(first: Sequence[Piece], more: Piece | None, low: int, high: int | None) -> Piece | None:
    """Of an array: `first` are its first ones, then `more` again and again; `low` to `high` in all.

    None where that is impossible.
    """
    most = len(first) if more is None else high
    if high is not None and most is not None:
        most = min(most, high)
    if most is not None and low > most:
        return None
    first = first[:most]
    if not first:
        return EMPTY if more is None or most == 0 else repeated(listed(more, SEPARATOR, max(low, 1), most),
                                                                min(low, 1), 1)
    tail = EMPTY if more is None or most == len(first) else repeated(
        sequence(SEPARATOR, more), max(low - len(first), 0), None if most is None else most - len(first))
    for place in reversed(range(len(first))):
        tail = sequence(SEPARATOR if place else EMPTY, first[place], tail)
        tail = repeated(tail, int(place < low), 1)
    return tail
