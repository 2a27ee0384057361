"""What one rendering of a chat template may use: templates come with checkpoints, so they are other people's programs.

Jinja's sandbox keeps a template from reaching Python's insides, but not from looping or growing without end. Limits are
far above what a conversation needs, and reaching one is an error of the template.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from types import BuiltinMethodType, MethodDescriptorType
from typing import Any

from jinja2 import Environment
from jinja2.exceptions import SecurityError
from jinja2.nodes import EvalContext
from jinja2.runtime import Context
from jinja2.utils import Namespace

MOST_TURNS = 1_000_000  # turns of loops and calls, of one rendering
SECONDS = 5.0  # of one rendering
MOST_SOURCE = 500_000  # characters of a template
MOST_TEXT = 4_000_000  # characters and items of any one value, as printing it would meet them
MOST_MADE = 200_000_000  # characters and items of all values together
MOST_OUTPUT = 50_000_000  # characters put out, pieces of macros and blocks counted each time
MOST_SEARCH = 1_000_000_000  # characters of a text times those it is searched for, where that is what a search costs
MOST_BITS = 100_000  # of an integer
MOST_WIDTH = 1000  # of padding and indents
MOST_FORMAT = 9999  # of a width in a format

_SIZED = (str, bytes, list, tuple, dict, set, frozenset)

_WIDE_METHODS = {"center", "ljust", "rjust", "zfill", "expandtabs"}
_WIDE_FILTERS = {"center", "indent", "wordwrap", "batch", "slice", "tojson", "round"}
_SEARCHES = {"strip", "lstrip", "rstrip", "rfind", "rindex", "rsplit", "rpartition"}
# Of no use for a prompt: bytes, and texts put in place of single characters, have no bounds here.
_REFUSED_METHODS = {"encode", "translate", "maketrans", "to_bytes", "from_bytes"}


class Budget:
    """What is left of one rendering; it also holds the time that the rendering sees, which must not move."""

    def __init__(self, now: datetime) -> None:
        self.now, self._turns, self._output, self._made = now, MOST_TURNS, MOST_OUTPUT, MOST_MADE
        self._end = time.monotonic() + SECONDS

    def check_time(self) -> None:
        """Whether there is any left."""
        if time.monotonic() > self._end:
            raise SecurityError(f"it takes more than {SECONDS:g} s")

    def made(self, value: Any, inside: bool = True) -> None:
        """A value was made; `inside`: of values that were not together before."""
        self.check_time()
        if isinstance(value, _SIZED):
            check_size(weigh(value) if inside and not isinstance(value, str) else len(value))
            self._made -= len(value)
            if self._made < 0:
                raise SecurityError(f"it makes values of more than {MOST_MADE} characters and items together")

    def turn(self, count: int) -> None:
        """Loop turns or calls are about to happen."""
        self.check_time()
        self._turns -= count
        if self._turns < 0:
            raise SecurityError(f"it takes more than {MOST_TURNS} turns of loops and calls")

    def put_out(self, count: int) -> None:
        """Characters are put out."""
        self.check_time()
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


_ITEM = 10  # characters of an item besides its text: quotes, commas, digits


def weigh(value: Any, indent: int = 0) -> int:
    """Characters and items of a value as printing it meets them: what lies in two places counts twice, so that a few
    lists in each other are not 2^40 letters. `indent`: characters added before each item, for each level it is deep.

    Raises SecurityError beyond MOST_TEXT.
    """
    total, waiting = 0, [(value, 0)]
    while waiting:
        one, depth = waiting.pop()
        total += _ITEM + indent * depth
        inner: Iterable[Any] = ()
        if isinstance(one, (str, bytes)):
            total += len(one)
        elif isinstance(one, (list, tuple, set, frozenset)):
            inner = one
        elif isinstance(one, dict):
            inner = (*one.keys(), *one.values()) if len(one) < MOST_TEXT else one
        elif isinstance(one, Namespace):
            inner = (object.__getattribute__(one, "_Namespace__attrs"),)
        check_size(total + (len(inner) if isinstance(inner, (list, tuple)) else 0))
        waiting += [(part, depth + 1) for part in inner]
    return total


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
        check_format(left, right)


def check_call(called: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Whether a method of a text makes nothing huge; raises SecurityError."""
    called = getattr(called, "__wrapped__", called)  # the sandbox wraps `format`
    text = getattr(called, "__self__", None)
    name = getattr(called, "__name__", "")
    if name in _REFUSED_METHODS and isinstance(called, (BuiltinMethodType, MethodDescriptorType)):
        raise SecurityError(f"it asks for {name}, which templates have no use for")
    if not isinstance(text, str):
        return
    if name in ("format", "format_map"):
        check_format(text, (*arguments, *named.values()))
        for value in (*arguments, *named.values()):
            check_width(value)
    if not isinstance(called, BuiltinMethodType):
        return
    if name in _SEARCHES:
        check_search(text, arguments)
    if name in _WIDE_METHODS:
        for value in (*arguments, *named.values()):
            check_width(value)
        if name == "expandtabs":
            check_size(len(text) + text.count("\t") * MOST_WIDTH)
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


def check_search(text: str, arguments: Iterable[Any]) -> None:
    """Whether looking for one text in another, which may cost their product, is quick."""
    longest = max((len(one) for one in arguments if isinstance(one, str)), default=0)
    if len(text) * longest > MOST_SEARCH:
        raise SecurityError(f"it looks for {longest} characters in {len(text)}")


def limited(filters: dict[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """The filters; what they take and make is bounded."""
    def bound(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)  # keeps jinja's marks of what is passed
        def inner(*arguments: Any, **named: Any) -> Any:
            _check_filter(name, arguments, named)
            result = function(*arguments, **named)
            if budget := current():
                budget.made(result)
            return result
        return inner
    return {name: bound(name, function) for name, function in filters.items()}


def _check_filter(name: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Whether a filter makes nothing huge; Jinja's own first argument may stand before the value."""
    values = [one for one in arguments if not isinstance(one, (Context, Environment, EvalContext))]
    options = (*values[1:], *named.values())
    if name in _WIDE_FILTERS:
        for option in options:
            check_width(option)
    if not values or not isinstance(values[0], str):
        return
    if name == "format":
        check_format(values[0], options)
    elif name == "trim":
        check_search(values[0], options)
    elif name in ("indent", "wordwrap"):
        longest = max((len(one) if isinstance(one, str) else one for one in options if isinstance(one, (str, int))),
                      default=8)
        many = values[0].count("\n") + 1 if name == "indent" else len(values[0])
        check_size(len(values[0]) + many * (longest if name == "indent" else _longest_text(options)))


def _longest_text(options: Iterable[Any]) -> int:
    return max((len(one) for one in options if isinstance(one, str)), default=1)


def _check_bits(bits: int) -> None:
    if bits > MOST_BITS:
        raise SecurityError(f"it computes an integer of {bits} bits, more than {MOST_BITS}")


def check_format(text: str, values: Any) -> None:
    """Whether a text stays small when values are put into it."""
    places = text.count("%") + text.count("{")
    check_size(len(text) + places * MOST_FORMAT * any(map(str.isdigit, text)))
    check_size(len(text) + weigh(values) * (places if isinstance(values, dict) or "{" in text else 1))
    if re.search(r"%[^%a-zA-Z]*\*", text) or re.search(r"[%{][^%}a-zA-Z]*\d{5,}", text):
        raise SecurityError(f"it formats with a width beyond {MOST_FORMAT} or one from outside the format")
