"""Numbers of things and of bytes as words, and text of strangers in a message: the same everywhere."""

from __future__ import annotations

import re

# Control characters, line and paragraph separators, marks that turn the direction of text around, halves of characters.
_UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def count(amount: int, thing: str, ending: str = "s") -> str:
    """"1 token", "1,234 tokens", "2 passes"."""
    return f"{amount:,} {thing}{'' if amount == 1 else ending}"


def size(amount: float) -> str:
    """Bytes in a unit that reads well, of powers of 1000; what a user gives (4G) is of powers of 1024."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if amount >= factor:
            return f"{amount / factor:.{1 if amount < 100 * factor else 0}f} {unit}"
    return count(round(amount), "byte")


def listed(things: list[str]) -> str:
    """"a", "a and b", "a, b and c"; at least one."""
    return " and ".join(part for part in (", ".join(things[:-1]), things[-1]) if part)


def visible(text: str, keep: str = "") -> str:
    """Text in which nothing steers a terminal or breaks a line: such characters, but those of `keep`, as `\\x1b`."""
    return _UNSEEN.sub(lambda found: found[0] if found[0] in keep else found[0].encode("unicode_escape").decode(), text)
