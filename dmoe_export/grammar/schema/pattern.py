"""JSON schema's `pattern`, an ECMAScript expression that is searched for → the JSON strings in which it is found.

What JavaScript and Python read differently is taken in the sense in which both find it, or refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from .characters import ASCII, EVERY, Ranges, union, without, written
from .pieces import EMPTY, Piece, either, repeated, sequence

MOST_CHARACTERS = 1000
MOST_NESTED = 20  # groups
MOST_TIMES = 1000

_DIGITS: Ranges = ((0x30, 0x39),)
_WORD: Ranges = ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A))
_SPACE: Ranges = ((0x09, 0x0D), (0x20, 0x20))
_NO_SPACE = without(ASCII, ((0x09, 0x0D), (0x1C, 0x20)))  # Python has four more
_CLASSES = {"d": _DIGITS, "w": _WORD, "s": _SPACE, "D": without(ASCII, _DIGITS), "W": without(ASCII, _WORD),
            "S": _NO_SPACE}  # beyond ASCII the two languages differ
_DOT = without(EVERY, ((0x0A, 0x0A), (0x0D, 0x0D), (0x2028, 0x2029)))
_CONTROLS = {"n": 0x0A, "r": 0x0D, "t": 0x09, "f": 0x0C, "v": 0x0B, "0": 0}


@dataclass(frozen=True)
class Node:
    """Characters, parts one after the other, or one of several ways; `low` to `high` times."""

    characters: Ranges | None = None
    parts: tuple[Node, ...] = ()
    ways: tuple[Node, ...] = ()
    low: int = 1
    high: int | None = 1

    def lengths(self) -> tuple[int, int | None]:
        """Fewest and most characters of a match; None: no most."""
        if self.characters is not None:
            inner: tuple[int, int | None] = 1, 1
        elif self.ways:
            each = [way.lengths() for way in self.ways]
            inner = min(a for a, _ in each), _most([b for _, b in each], max)
        else:
            each = [part.lengths() for part in self.parts]
            inner = sum(a for a, _ in each), _most([b for _, b in each], sum)
        if inner[1] == 0 or self.high == 0:
            return 0, 0
        return inner[0] * self.low, None if self.high is None or inner[1] is None else inner[1] * self.high

    def written(self) -> Piece | None:
        """In JSON; None where it needs a character that cannot be written."""
        inner: Piece | None
        if self.characters is not None:
            inner = written(self.characters)
        elif self.ways:
            ways = [way for one in self.ways if (way := one.written()) is not None]
            inner = either(ways) if ways else None
        else:
            parts = [part.written() for part in self.parts]
            inner = None if None in parts else sequence(*(part for part in parts if part is not None))
        if inner is None:
            return EMPTY if self.low == 0 else None
        return repeated(inner, self.low, self.high)


def _most(each: list[int | None], of: Callable[[list[int]], int]) -> int | None:
    known = [one for one in each if one is not None]
    return None if len(known) < len(each) else of(known)


ANY = Node(EVERY, low=0, high=None)


def pattern_text(pattern: str, low: int, high: int | None) -> Piece | None:
    """What stands between the quotes, of `low` to `high` characters; None where there is no such text.

    Raises ValueError with words for what is not supported.
    """
    if len(pattern) > MOST_CHARACTERS:
        raise ValueError(f"has {len(pattern)} characters, more than {MOST_CHARACTERS}")
    fitting = _fitting(_Reader(pattern).searched(), low, high)
    return None if fitting is None else fitting.written()


def _fitting(node: Node, low: int, high: int | None) -> Node | None:
    """Those of its matches that have `low` to `high` characters."""
    least, most = node.lengths()
    if low <= least and (high is None or (most is not None and most <= high)):
        return node
    if (high is not None and least > high) or (most is not None and most < low):
        return None
    once = node.low == node.high == 1
    if once and node.ways:
        ways = [way for one in node.ways if (way := _fitting(one, low, high)) is not None]
        return Node(ways=tuple(ways)) if ways else None
    if once and node.parts:
        loose = [part for part in node.parts if part.lengths()[0] != part.lengths()[1]]
        if len(loose) == 1:
            fixed = least - loose[0].lengths()[0]
            part = _fitting(loose[0], max(0, low - fixed), None if high is None else high - fixed)
            return part and Node(parts=tuple(part if one is loose[0] else one for one in node.parts))
    size, most_of_one = replace(node, low=1, high=1).lengths()
    if size == most_of_one and size:
        fewest = max(node.low, -(-low // size))
        times = [one for one in (node.high, None if high is None else high // size) if one is not None]
        if times and fewest > min(times):
            return None
        return replace(node, low=fewest, high=min(times) if times else None)
    raise ValueError("does not go with minLength and maxLength, as more than one part of it has no fixed length; "
                     "anchor it with ^ and $, and put the lengths into it")


class _Reader:
    def __init__(self, pattern: str) -> None:
        self.pattern, self.at, self.nested = pattern, 0, 0

    def searched(self) -> Node:
        """The whole, with anything before and behind what is not anchored."""
        ways = []
        while True:
            anchored = self.take("^")
            parts = self.parts()
            ended = self.take("$")
            ways.append(Node(parts=(*([] if anchored else [ANY]), *parts, *([] if ended else [ANY]))))
            if not self.take("|"):
                break
        if self.at < len(self.pattern):
            raise ValueError("has a parenthesis too many" if self.next == ")" else
                             f"has {self.next} where it is not supported; anchors stand at its ends alone")
        return Node(ways=tuple(ways))

    @property
    def next(self) -> str:
        return self.pattern[self.at:self.at + 1]

    def take(self, text: str) -> bool:
        found = self.pattern.startswith(text, self.at)
        self.at += len(text) * found
        return found

    def parts(self) -> tuple[Node, ...]:
        parts = []
        while self.next and self.next not in "|)$^":
            parts.append(self.times(self.atom()))
        return tuple(parts)

    def atom(self) -> Node:
        if self.take("("):
            return self.group()
        if self.take("["):
            return Node(self.set_())
        if self.take("."):
            return Node(_DOT)
        if self.take("\\"):
            return Node(self.escape()[0])
        if self.next in "*+?{":
            raise ValueError(f"has {self.next} with nothing to repeat; write \\{self.next} for the character")
        return Node(self.character())

    def group(self) -> Node:
        if self.next == "?" and not self.take("?:"):
            raise ValueError(f"has ({self.pattern[self.at:self.at + 2]}, and of groups only (…) and (?:…) are "
                             "supported")
        self.nested += 1
        if self.nested > MOST_NESTED:
            raise ValueError(f"has groups in groups, more than {MOST_NESTED}")
        ways = [Node(parts=self.parts())]
        while self.take("|"):
            ways.append(Node(parts=self.parts()))
        if self.next in "^$" and self.next:
            raise ValueError(f"has {self.next} inside a group; anchors stand at its ends alone")
        if not self.take(")"):
            raise ValueError("has a group without an end")
        self.nested -= 1
        return Node(ways=tuple(ways))

    def times(self, node: Node) -> Node:
        low, most = 0, None  # type: int, int | None
        if self.take("*"):
            pass
        elif self.take("+"):
            low, most = 1, None
        elif self.take("?"):
            low, most = 0, 1
        elif self.take("{"):
            low, most = self.counted()
        else:
            return node
        self.take("?")  # lazy: the same texts
        if self.next and self.next in "*+?{":
            raise ValueError(f"repeats a repetition with {self.next}; put the inner one into a group")
        return Node(parts=(node,), low=low, high=most)

    def counted(self) -> tuple[int, int | None]:
        inside, brace, _ = self.pattern[self.at:].partition("}")
        low, comma, high = inside.partition(",")
        numbers = [one for one in (low, high) if one]
        if not brace or not low or not all(one.isascii() and one.isdigit() and len(one) < 9 for one in numbers):
            raise ValueError("has { without numbers such as {2,8} behind it; write \\{ for the character")
        self.at += len(inside) + 1
        counts = int(low), None if comma and not high else int(high or low)
        if max(int(one) for one in numbers) > MOST_TIMES:
            raise ValueError(f"repeats {{{inside}}} times, more than {MOST_TIMES}")
        if counts[1] is not None and counts[0] > counts[1]:
            raise ValueError(f"repeats {{{inside}}} times, which is none")
        return counts

    def set_(self) -> Ranges:
        negated, found, wide = self.take("^"), list[tuple[int, int]](), False
        if self.next == "]":
            raise ValueError("has an empty class of characters")
        while not self.take("]"):
            if not self.next:
                raise ValueError("has a class of characters without an end")
            one, many = self.member()
            wide |= many
            if self.next == "-" and self.pattern[self.at + 1:self.at + 2] not in ("]", ""):
                self.at += 1
                last, many_last = self.member()
                if many or many_last or one[0][0] > last[0][0]:
                    raise ValueError("has a range of characters that is none")
                one = ((one[0][0], last[0][0]),)
            found += one
        return without(ASCII if wide else EVERY, union(found)) if negated else union(found)

    def member(self) -> tuple[Ranges, bool]:
        """And whether it is a class such as \\d."""
        if not self.take("\\"):
            return self.character(), False
        if self.take("b"):
            return ((0x08, 0x08),), False
        return self.escape()

    def character(self) -> Ranges:
        code = ord(self.next)
        if 0xD800 <= code < 0xE000:
            raise ValueError("has half of a surrogate pair, which is no character")
        self.at += 1
        return ((code, code),)

    def escape(self) -> tuple[Ranges, bool]:
        one = self.next
        self.at += 1
        if one in _CLASSES and one:
            return _CLASSES[one], True
        size = {"x": 2, "u": 4}.get(one)
        if size:
            digits = self.pattern[self.at:self.at + size]
            try:
                code = int(digits, 16) if len(digits) == size and digits.isalnum() and digits.isascii() else -1
            except ValueError:
                code = -1
            if code < 0 or 0xD800 <= code < 0xE000:
                raise ValueError(f"has \\{one}{digits}, which is no character; write it as it is")
            self.at += size
            return ((code, code),), False
        if one in _CONTROLS and one and not (one == "0" and self.next.isdigit()):
            return ((_CONTROLS[one], _CONTROLS[one]),), False
        if one and one.isascii() and not one.isalnum() and one != "_" and one >= " ":
            return ((ord(one), ord(one)),), False
        raise ValueError(f"has \\{one}, which is not supported")
