"""Numbers as text: Python also takes digits of other scripts and underscores, which nobody means."""

from __future__ import annotations

import re


def integer(text: str) -> int:
    """Of ASCII digits, with a sign or without; raises ValueError for anything else, and for more than 100 digits."""
    if not re.fullmatch(r"\s*[+-]?[0-9]{1,100}\s*", text):
        raise ValueError(f"{text[:100]!r} is no integer")
    return int(text)


def real(text: str) -> float:
    """Likewise, with a fraction and an exponent or without."""
    if not re.fullmatch(r"\s*[+-]?[0-9]{0,100}\.?[0-9]{0,100}([eE][+-]?[0-9]{1,4})?\s*", text):
        raise ValueError(f"{text[:100]!r} is no number")
    return float(text)
