"""Numbers of things and of bytes as words, the same in every message."""

from __future__ import annotations


def count(amount: int, thing: str, ending: str = "s") -> str:
    """"1 token", "1,234 tokens", "2 passes"."""
    return f"{amount:,} {thing}{'' if amount == 1 else ending}"


def size(amount: float) -> str:
    """Bytes in a unit that reads well, of powers of 1000; what a user gives (4G) is of powers of 1024."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if amount >= factor:
            return f"{amount / factor:.{1 if amount < 100 * factor else 0}f} {unit}"
    return count(round(amount), "byte")
