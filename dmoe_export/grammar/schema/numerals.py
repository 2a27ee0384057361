"""Numbers between bounds, as regular expressions of the decimals that JSON writes.

Up to 15 digits: so many survive in a double, so whoever reads one compares with the bounds as written.
"""

from __future__ import annotations

import math
from fractions import Fraction

from .pieces import Piece, piece

DIGITS = 15
OPEN_DIGITS = 9  # before the point, on a side without a bound, of numbers that have one on the other
INTEGER = piece("(?:0|-?[1-9][0-9]{0,14})", 45)
NUMBER = piece(r"-?(?:0|[1-9][0-9]{0,14})(?:\.[0-9]{1,15})?(?:[eE][+-]?[0-9]{1,2})?", 90)


def between(low: Fraction | None, high: Fraction | None, open_low: bool, open_high: bool, whole: bool) -> Piece | None:
    """Numbers from `low` to `high`, None: no bound; `open_…`: without the bound itself; `whole`: integers alone.

    Without bounds also exponents of two digits. None where no number of up to 15 digits is between.
    """
    if low is None and high is None:
        return INTEGER if whole else NUMBER
    most = 10**DIGITS
    near = [abs(bound) for bound in (low, high) if bound is not None and abs(bound) < most]
    before = max([len(str(int(bound))) for bound in near] + [OPEN_DIGITS] * (len(near) < 2))
    places = 0 if whole else DIGITS - before
    scale, limit = 10**places, most - 1 if whole else 10**(before + places) - 1
    least = -limit if low is None else max(-limit, _above(low * scale, open_low))
    greatest = limit if high is None else min(limit, -_above(-high * scale, open_high))
    if least > greatest:
        return None
    ways = []
    if least < 0:
        ways += [f"-{way}" for way in _ways(max(1, -greatest), -least, places)]
    if greatest >= 0:
        ways += _ways(max(0, least), greatest, places)
    return piece(f"(?:{'|'.join(ways)})")


def _above(bound: Fraction, excluded: bool) -> int:
    """The first integer that is not below, or above, it."""
    return math.floor(bound) + 1 if excluded else math.ceil(bound)


def _ways(low: int, high: int, places: int) -> list[str]:
    """Of 0 ≤ low ≤ high, in units of the last of so many decimal places."""
    scale = 10**places
    (first, rest), (last, end) = divmod(low, scale), divmod(high, scale)
    if first == last:
        return [f"{first}{_fraction(rest, end, places)}"]
    ways = []
    if rest:
        ways, first = [f"{first}{_fraction(rest, scale - 1, places)}"], first + 1
    if end < scale - 1:
        ways, last = [*ways, f"{last}{_fraction(0, end, places)}"], last - 1
    if first <= last:
        ways.append(f"(?:{'|'.join(_integers(first, last))}){_fraction(0, scale - 1, places)}")
    return ways


def _integers(low: int, high: int) -> list[str]:
    """Of 0 ≤ low ≤ high, by their number of digits."""
    ways = []
    while low <= high:
        end = min(high, 10**len(str(low)) - 1)
        ways.append(_same_length(str(low), str(end)))
        low = end + 1
    return ways


def _same_length(low: str, high: str) -> str:
    """All digits of them."""
    if not low:
        return ""
    size = len(low) - 1
    full_low, full_high = low[1:] == "0" * size, high[1:] == "9" * size
    if low[0] == high[0] and not (full_low and full_high):
        return low[0] + _same_length(low[1:], high[1:])
    first, last = int(low[0]) + (not full_low), int(high[0]) - (not full_high)
    ways = [] if full_low else [low[0] + _same_length(low[1:], "9" * size)]
    if first <= last:
        ways.append(_digit(first, last) + (f"[0-9]{{{size}}}" if size else ""))
    if not full_high:
        ways.append(high[0] + _same_length("0" * size, high[1:]))
    return ways[0] if len(ways) == 1 else f"(?:{'|'.join(ways)})"


def _fraction(low: int, high: int, places: int) -> str:
    """Point and decimals from `low` to `high` in units of the last place; nothing is 0, too."""
    if not places:
        return ""
    if not high:
        return f"(?:\\.0{{1,{places}}})?"
    decimals = f"\\.{_decimals(str(low).zfill(places), str(high).zfill(places))}"
    return decimals if low else f"(?:{decimals})?"


def _decimals(low: str, high: str) -> str:
    """One digit or more, at most as many as `low` has; what is missing is 0."""
    size = len(low) - 1
    full_low, full_high = low[1:] == "0" * size, high[1:] == "9" * size
    if low[0] == high[0] and not (full_low and full_high):
        return low[0] + _more(low[1:], high[1:])
    first, last = int(low[0]) + (not full_low), int(high[0]) - (not full_high)
    ways = [] if full_low else [low[0] + _more(low[1:], "9" * size)]
    if first <= last:
        ways.append(_digit(first, last) + (f"[0-9]{{0,{size}}}" if size else ""))
    if not full_high:
        ways.append(high[0] + _more("0" * size, high[1:]))
    return ways[0] if len(ways) == 1 else f"(?:{'|'.join(ways)})"


def _more(low: str, high: str) -> str:
    decimals = _decimals(low, high) if low else ""
    return decimals if low.strip("0") else f"(?:{decimals})?"


def _digit(first: int, last: int) -> str:
    return str(first) if first == last else f"[{first}-{last}]"
