"""Schemas that hold together: `allOf`, and what stands beside `$ref`, `anyOf` and `oneOf`, as one."""

from __future__ import annotations

from typing import Any

from .keywords import refused, same

_TIGHTER = {**{name: max for name in ("minLength", "minItems", "minProperties", "minimum", "exclusiveMinimum")},
            **{name: min for name in ("maxLength", "maxItems", "maxProperties", "maximum", "exclusiveMaximum")}}
_TOGETHER = (("items", "prefixItems"), ("additionalProperties", "properties"))


def both(one: dict[str, Any], other: dict[str, Any], where: str) -> dict[str, Any]:
    """A schema of what is valid under the two; raises RequestError where keywords cannot be joined one by one."""
    for first, second in _TOGETHER:  # the one reads the other beside it
        for here, there in ((one, other), (other, one)):
            if here.get(first, True) is not True and second in there and here.get(second) != there[second]:
                raise refused(where, f"joins {first} with {second} of another schema, which is not supported; write "
                                     "them into one schema")
    joined = dict(one)
    for name, value in other.items():
        mine: Any = joined.get(name)
        if name not in joined or same(mine) == same(value):
            joined[name] = value
        elif name in _TIGHTER:
            joined[name] = _TIGHTER[name](mine, value)
        elif name == "type":
            joined[name] = _types(mine, value)
        elif name == "required":
            joined[name] = [*mine, *(one for one in value if one not in mine)]
        elif name == "enum":
            kept = {same(one) for one in value}
            joined[name] = [one for one in mine if same(one) in kept]
        elif name == "properties":
            joined[name] = mine | {key: {"allOf": [mine[key], one]} if key in mine else one
                                   for key, one in value.items()}
        elif name in ("items", "propertyNames", "additionalProperties"):
            joined[name] = {"allOf": [mine, value]}
        else:
            raise refused(where, f"has {name} twice, with two values that cannot be joined; leave one out")
    return joined


def _types(one: Any, other: Any) -> list[str]:
    mine, theirs = ([names] if isinstance(names, str) else list(names) for names in (one, other))
    return [name for name in dict.fromkeys((*mine, *theirs)) if all(
        name in names or (name == "integer" and "number" in names) for names in (mine, theirs))]
