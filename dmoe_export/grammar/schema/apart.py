"""Which branches of `oneOf` exclude each other: what is written for one is never valid under another."""

from __future__ import annotations

import itertools
from typing import Any

from .flat import At, Flat, Reading
from .keywords import OF_TYPE, TYPES, kinds_of, refused, same


def check(reading: Reading, beside: Flat, branches: list[Any], at: At) -> None:
    """Raise RequestError unless each branch, with what stands beside them, is seen to exclude each other branch.

    `beside` has the choice itself first, and those that follow it.
    """
    mine = [reading.flat([(beside.plain, beside.at), (one, at.into(i))]) for i, one in enumerate(branches)]
    theirs = [reading.flat([(one, at.into(i))]) for i, one in enumerate(branches)]
    for number, other in itertools.permutations(range(len(branches)), 2):
        x, y = mine[number], theirs[other]
        if x is None or branches[other] is False:
            continue
        whole = len(beside.choices) == 1 and not x.choices
        if y is None or not _excludes(reading, x, y, whole):  # None: a reference that returns, which says nothing
            raise refused(at.where, f"has branches {number} and {other} that may hold at once; use anyOf, or tell them "
                                    "apart by type, or by a required property with const")


def _excludes(reading: Reading, mine: Flat, theirs: Flat, whole: bool) -> bool:
    """`whole`: no choice adds properties to what is written."""
    x, y = mine.plain, theirs.plain
    types, valid = types_of(x) or TYPES, types_of(y) if "type" in y or values_of(y) is not None else TYPES
    if not _wide(types) & _wide(valid or ()):
        return True
    values, others = values_of(x), values_of(y)
    if values is not None and others is not None:
        return not {same(one) for one in values} & {same(one) for one in others}
    if values is not None or list(types) != ["object"]:
        return False
    properties, required = x.get("properties", {}), x.get("required", [])
    if whole and (properties or required) and set(y.get("required", [])) - {*properties, *required}:
        return True
    if y.get("additionalProperties") is False and set(required) - set(y.get("properties", {})):
        return True
    for name in set(required) & set(properties) & set(y.get("properties", {})):
        one = reading.flat([(properties[name], mine.at.into(name))])
        another = reading.flat([(y["properties"][name], theirs.at.into(name))])
        if one is None or y["properties"][name] is False:
            return True
        if another is not None and _excludes(reading, one, another, not one.choices):
            return True
    return False


def _wide(types: Any) -> set[str]:
    return {"number" if name == "integer" else name for name in types}


def values_of(plain: dict[str, Any]) -> list[Any] | None:
    """Of enum and const, those that have the type; None where all values of a kind are meant."""
    if "enum" not in plain and "const" not in plain:
        return None
    values = plain.get("enum", [plain.get("const")])
    if "const" in plain:
        values = [value for value in values if same(value) == same(plain["const"])]
    if "type" in plain:
        names = _named(plain)
        values = [value for value in values if kinds_of(value) & set(names)]
    return values


def types_of(plain: dict[str, Any]) -> list[str] | None:
    """Types of what is written: as said, else those that keywords are about; None: any."""
    values = values_of(plain)
    if values is not None:
        return sorted(set().union(*map(kinds_of, values)))
    if "type" in plain:
        names = _named(plain)
        return [name for name in names if name != "integer" or "number" not in names]
    found = [name for name, keywords in OF_TYPE.items() if any(one in plain for one in keywords)]
    return found or None


def _named(plain: dict[str, Any]) -> list[str]:
    names = plain["type"]
    return [names] if isinstance(names, str) else names
