"""What one rendering of a chat template may use: templates come with checkpoints, so they are other people's programs.

Jinja's sandbox keeps a template from reaching Python's insides, but not from looping or growing without end. Limits are
far above what a conversation needs, and reaching one is an error of the template.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from types import BuiltinMethodType
from typing import Any

from jinja2.exceptions import SecurityError

MOST_TURNS = 1_000_000  # turns of loops and calls, of one rendering
MOST_TEXT = 10_000_000  # characters or items of any one value
MOST_OUTPUT = 50_000_000  # characters put out, pieces of macros and blocks counted each time
MOST_BITS = 100_000  # of an integer
MOST_WIDTH = 1000  # of padding, indents and formats

_WIDE_METHODS = {"center", "ljust", "rjust", "zfill", "expandtabs"}
_WIDE_FILTERS = ("center", "indent", "wordwrap", "batch", "slice", "tojson", "round")


class Budget:
    """What is left of one rendering; it also holds the time that the rendering sees, which must not move."""

    def __init__(self, now: datetime) -> None:
        self.now, self._turns, self._output = now, MOST_TURNS, MOST_OUTPUT

    def turn(self, count: int) -> None:
        """Loop turns or calls are about to happen."""
        self._turns -= count
        if self._turns < 0:
            raise SecurityError(f"it takes more than {MOST_TURNS} turns of loops and calls")

    def put_out(self, count: int) -> None:
        """Characters are put out."""
        self._output -= count
        if self._output < 0:
            raise SecurityError(f"it puts out more than {MOST_OUTPUT} characters")


_current: ContextVar[Budget | None] = ContextVar("budget of a template", default=None)


@contextmanager
def rendering(budget: Budget) -> Iterator[None]:
    """Within it, templates use up this budget."""
    token = _current.set(budget)
    try:
        yield
    finally:
        _current.reset(token)


def current() -> Budget | None:
    """The budget of the rendering under way; None while a template is compiled."""
    return _current.get()


def check_size(size: int) -> None:
    """A text or list of so many characters or items is about to be made."""
    if size > MOST_TEXT:
        raise SecurityError(f"it makes a value of {size} characters or items, more than {MOST_TEXT}")


def check_operation(operator: str, left: Any, right: Any) -> None:
    """Whether a product, power, sum or format stays small; raises SecurityError."""
    if operator == "+" and isinstance(left, (str, list, tuple)) and isinstance(right, (str, list, tuple)):
        check_size(len(left) + len(right))
    elif operator == "*":
        for many, count in ((left, right), (right, left)):
            if isinstance(many, (str, list, tuple)) and isinstance(count, int):
                check_size(len(many) * max(count, 0))
        if isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() + right.bit_length())
    elif operator == "**" and isinstance(left, int) and isinstance(right, int) and right > 0:
        _check_bits(left.bit_length() * right)
    elif operator == "%" and isinstance(left, str):
        _check_format(left)


def check_call(called: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Whether a method of a text makes nothing huge; raises SecurityError."""
    called = getattr(called, "__wrapped__", called)  # the sandbox wraps `format`
    text = getattr(called, "__self__", None)
    name = getattr(called, "__name__", "")
    if not isinstance(text, str):
        return
    if name in ("format", "format_map"):
        _check_format(text)
        for value in (*arguments, *named.values()):
            check_width(value)
    if not isinstance(called, BuiltinMethodType):
        return
    if name in _WIDE_METHODS:
        for value in (*arguments, *named.values()):
            check_width(value)
    elif name == "join" and arguments and isinstance(arguments[0], (list, tuple)):
        check_join(text, arguments[0])
    elif name == "replace" and len(arguments) >= 2 and all(isinstance(a, str) for a in arguments[:2]):
        check_replace(text, *arguments[:2])


def check_join(glue: str, parts: list[Any] | tuple[Any, ...]) -> None:
    """Whether joined parts stay small."""
    check_size(sum(len(part) if isinstance(part, str) else 1 for part in parts) + len(glue) * len(parts))


def check_replace(text: str, old: str, new: str) -> None:
    """Whether a text stays small when `old` becomes `new`."""
    check_size(len(text) + text.count(old) * len(new))


def check_width(value: Any) -> None:
    """Whether a width is one."""
    if isinstance(value, int) and not isinstance(value, bool) and value > MOST_WIDTH:
        raise SecurityError(f"it asks for a width of {value}, more than {MOST_WIDTH}")


def limited(filters: dict[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """The filters, those that take a width bounded."""
    def bound(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)  # keeps jinja's marks of what is passed
        def inner(*arguments: Any, **named: Any) -> Any:
            for value in (*arguments[1:], *named.values()):
                check_width(value)
            return function(*arguments, **named)
        return inner
    return filters | {name: bound(filters[name]) for name in _WIDE_FILTERS}


def _check_bits(bits: int) -> None:
    if bits > MOST_BITS:
        raise SecurityError(f"it computes an integer of {bits} bits, more than {MOST_BITS}")


def _check_format(text: str) -> None:
    if re.search(r"%[^%a-zA-Z]*\*", text) or re.search(r"[%{][^%}a-zA-Z]*\d{5,}", text):
        raise SecurityError(f"it formats with a width beyond {MOST_WIDTH} or one from outside the format")
