"""How an option of a request is told, once, at its field of `DecodeSettings`: checks and help texts come of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from typing import Any, get_args, get_type_hints

from ..errors import RequestError

_KINDS: dict[type, tuple[Any, str]] = {
    bool: (bool, "true or false"), int: (Integral, "an integer"), float: (Real, "a number"), str: (str, "text"),
    Path: ((str, PathLike), "a path")}


OFF = "off"  # said of an option that is off by default: so it is, whatever preset and bundle say


@dataclass(frozen=True)
class Rule:
    """Which values of the right type mean something, and the words for them ("at least 1")."""

    holds: Callable[[Any], bool]
    words: str


AT_LEAST_0 = Rule(lambda value: value >= 0, "0 or more")
AT_LEAST_1 = Rule(lambda value: value >= 1, "at least 1")
UP_TO_1000 = Rule(lambda value: 0 <= value <= 1000, "between 0 and 1000")
FINITE = Rule(lambda value: 0 <= value < float("inf"), "0 or more")
SHARE = Rule(lambda value: 0 <= value <= 1, "between 0 and 1")


def one_of(names: Sequence[str]) -> Rule:
    """Exactly these values."""
    return Rule(lambda value: isinstance(value, str) and value in names, f"{', '.join(names[:-1])} or {names[-1]}")


@dataclass(frozen=True)
class Told:
    """Stands in the annotation of an option: `field: Annotated[int, Told("Most tokens", AT_LEAST_1)] = 128`.

    `meaning` names unit and source, without a full stop. `shown`: the default in words. `of_bundle`: exported bundles
    may have a default of their own (`Manifest.decode_defaults`). `group`: the heading of the command line's help.
    `off`: a request may say OFF, as None is not said.
    """

    meaning: str
    rule: Rule | None = None
    shown: str | None = None
    of_bundle: bool = False
    group: str = "decoding"
    off: bool = False


@dataclass(frozen=True)
class Option:
    """One option; `types` are the members of its union, or its choices where it is a Literal."""

    name: str
    types: tuple[Any, ...]
    default: Any
    told: Told

    @property
    def several(self) -> type | None:
        """Of what several may be given; None where one value is all."""
        return next((kind for kind in (int, str) if Sequence[kind] in self.types), None)  # type: ignore[valid-type]

    @property
    def shown(self) -> str:
        """The default in words."""
        words = {"None": "off", "False": "off", "True": "on"}.get(str(self.default), str(self.default))
        words = words if self.told.shown is None else self.told.shown
        return f"the bundle's, or {words}" if self.told.of_bundle else words

    @property
    def words(self) -> str:
        """The values that mean something."""
        words = self.told.rule.words if self.told.rule else ""
        return f"{words}, or {OFF}" if self.told.off else words

    def is_off(self, value: object) -> bool:
        """Whether a request that says this says that the option is off."""
        return self.told.off and isinstance(value, str) and value == OFF

    @property
    def help(self) -> str:
        """Meaning, values and default, as on the command line and in the docstring of `Generator.generate`."""
        choices = all(isinstance(one, str) for one in self.types)  # the meaning names them
        values = f"{self.words}; " if self.words and not choices else ""
        return f"{self.told.meaning} [{values}default: {self.shown}]."

    def check(self, value: object) -> None:
        """Raise RequestError for a value of another type, or one that means nothing."""
        if value is None and type(None) in self.types:
            return
        kind = next((kind for kind in _KINDS if kind in self.types), None)
        if kind not in (None, str) and self.several is None:  # rules of texts and of several values look at types
            check_kind(self.name, value, kind, f", or {OFF}" if self.told.off else "")
        if self.told.rule and not self.told.rule.holds(value):
            raise RequestError(f"{self.name} is {_quoted(value)}, it must be {self.words}.")


def _quoted(value: object) -> str:
    """A value in a sentence: names as they are, other text so that blanks in it are seen, nothing without end."""
    return _cut(str(value) if not isinstance(value, str) or value.isidentifier() else repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}…"


def options_of(settings: type) -> dict[str, Option]:
    """The options of a dataclass whose annotations hold `Told`, by name and in order."""
    found = {}
    hints = get_type_hints(settings, include_extras=True)
    for one in fields(settings):
        hint, told = get_args(hints[one.name])
        found[one.name] = Option(one.name, get_args(hint) or (hint,), one.default, told)
    return found


def check_kind(name: str, value: object, kind: type, more: str = "") -> None:
    """Raise RequestError unless `value` is an int, a float (or an integer), a bool, a text or a path (or a text).

    Numbers of numpy are as good. `more`: words for what else is taken.
    """
    wanted, words = _KINDS[kind]
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
        raise RequestError(f"{name} is {_cut(repr(value))}, it must be {words}{more}.")
    if isinstance(value, Integral) and abs(int(value)) >= 2**128:  # arithmetic, and even words for it, would fail
        raise RequestError(f"{name} is an integer of {int(value).bit_length()} bits, it must have 128 at most.")
