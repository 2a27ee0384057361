"""Parts of a regular expression (syntax of Rust's crate regex) with the size that their repetitions come to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

MOST_SIZE = 500_000  # characters, those in repetitions counted as often as they are repeated
META = frozenset(r"\.+*?()|[]{}^$#&-~")


class Piece(NamedTuple):
    """An expression that can stand anywhere, and its size."""

    text: str
    size: int


class TooLarge(ValueError):
    """What the parts come to together; its words are for a sentence."""


def piece(text: str, size: int | None = None) -> Piece:
    """Raises TooLarge."""
    size = len(text) if size is None else size
    if size > MOST_SIZE:
        raise TooLarge(f"comes to a regular expression of more than {MOST_SIZE} characters; bound its lengths, or "
                       "write fewer parts")
    return Piece(text, size)


EMPTY = Piece("", 0)


def literal(text: str) -> Piece:
    """Exactly this."""
    return piece("".join(f"\\{one}" if one in META else one for one in text))


def sequence(*parts: Piece) -> Piece:
    """One after the other."""
    return piece("".join(part.text for part in parts), sum(part.size for part in parts))


def either(parts: Sequence[Piece]) -> Piece:
    """One of them; there is one at least."""
    different = list(dict.fromkeys(parts))
    if len(different) == 1:
        return different[0]
    return piece(f"(?:{'|'.join(part.text for part in different)})", sum(part.size + 1 for part in different) + 3)


def repeated(part: Piece, low: int, high: int | None) -> Piece:
    """So many times; `high` None is without end."""
    if (low, high) == (1, 1):
        return part
    if high == 0:
        return EMPTY
    times = {(0, None): "*", (1, None): "+", (0, 1): "?"}.get((low, high))
    if times is None:
        times = f"{{{low}}}" if low == high else f"{{{low},{'' if high is None else high}}}"
    return piece(f"(?:{part.text}){times}", (part.size + 4) * max(low, high or 1, 1))


def listed(part: Piece, separator: Piece, low: int, high: int | None) -> Piece:
    """`low` to `high` of them with the separator between, `high` at least 1.

    The last stands behind the others: so, the states of both ways to read an element are the same.
    """
    more = repeated(sequence(part, separator), max(low - 1, 0), None if high is None else high - 1)
    return repeated(sequence(more, part), min(low, 1), 1)
