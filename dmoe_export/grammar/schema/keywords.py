"""Keywords of JSON schema that are read, and the values they may have."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from ...errors import RequestError
from ...words import visible

MOST_CHARACTERS = 100_000
MOST_DEPTH = 40  # of a schema in a schema, references followed
MOST_NESTED = 100  # of arrays and objects in the text of a schema

TYPES = ("string", "integer", "number", "array", "object", "boolean", "null")
OF_TYPE = {"string": ("minLength", "maxLength", "pattern", "format"),
           "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
           "array": ("items", "prefixItems", "minItems", "maxItems", "uniqueItems"),
           "object": ("properties", "required", "additionalProperties", "propertyNames", "minProperties",
                      "maxProperties")}
# They ask for nothing; discriminator is OpenAPI's.
ANNOTATIONS = frozenset(("title", "description", "default", "examples", "$comment", "deprecated", "readOnly",
                         "writeOnly", "$defs", "definitions", "discriminator"))
OF_ROOT = frozenset(("$schema", "$id"))
DRAFTS = ("https://json-schema.org/draft/2020-12/schema", "https://json-schema.org/draft/2019-09/schema",
          "http://json-schema.org/draft-07/schema")

_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")


def is_number(value: Any) -> bool:
    """Of JSON; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_schema(value: Any) -> bool:
    return isinstance(value, (dict, bool))


def _is_type(value: Any) -> bool:
    names = [value] if isinstance(value, str) else value
    return isinstance(names, list) and bool(names) and all(one in TYPES for one in names)


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "type": (_is_type, f"one or several of {', '.join(TYPES)}"),
    "enum": (lambda v: isinstance(v, list) and bool(v), "a list of values"),
    "const": (lambda v: True, "a value"),
    "$ref": (lambda v: isinstance(v, str), "text"),
    **{name: (lambda v: isinstance(v, list) and bool(v) and all(map(_is_schema, v)), "a list of schemas")
       for name in ("anyOf", "oneOf", "allOf", "prefixItems")},
    **{name: (lambda v: is_number(v) and v >= 0 and v == int(v), "a number without fraction, 0 or more")
       for name in _COUNTS},
    **{name: (is_number, "a number") for name in _BOUNDS},
    "multipleOf": (lambda v: is_number(v) and v == 1, "1, as other multiples are not supported"),
    "pattern": (lambda v: isinstance(v, str), "text"),
    "format": (lambda v: isinstance(v, str), "text"),
    "uniqueItems": (lambda v: v is False, "false, as unlike items are not supported"),
    "items": (_is_schema, "a schema; a list of them is prefixItems"),
    "additionalProperties": (_is_schema, "a schema"),
    "propertyNames": (_is_schema, "a schema"),
    "properties": (lambda v: isinstance(v, dict) and all(map(_is_schema, v.values())), "an object of schemas"),
    "required": (lambda v: isinstance(v, list) and all(isinstance(one, str) for one in v), "a list of names")}


def refused(where: str, why: str) -> RequestError:
    """`where`: a JSON pointer as a fragment; `why` follows it in a sentence."""
    return RequestError(f"json_schema cannot be used: {visible(where[:200])} {why}.")


def check_keywords(schema: dict[str, Any], where: str) -> None:
    """Raise RequestError for keywords that are not read, and for values that mean nothing."""
    for name, value in schema.items():
        if name in ANNOTATIONS or (where == "#" and name in OF_ROOT):
            continue
        rule = _RULES.get(name)
        if rule is None:
            raise refused(where, f"has the keyword {name[:50]}, which is not supported; leave it out")
        if not rule[0](value):
            raise refused(where, f"has {name} {_shown(value)}, it must be {rule[1]}")


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 50 else f"{text[:50]}…"


def schema_of(given: str | Mapping[str, Any] | bool | None) -> Any:
    """JSON text or a mapping as plain values of JSON: a dict or a bool. Raises RequestError."""
    try:
        text = given if isinstance(given, str) else json.dumps(_plain(given), allow_nan=False)
        if len(text) > MOST_CHARACTERS:
            raise RequestError(f"json_schema has {len(text)} characters, more than {MOST_CHARACTERS}.")
        schema = json.loads(text, parse_constant=_no_constant, parse_float=_float)
    except (ValueError, TypeError, RecursionError):
        schema = None
    if not _is_schema(schema):
        raise RequestError("json_schema is no JSON of an object, true or false; give a schema such as "
                           '{"type": "object"}.')
    _check_nesting(schema)
    if isinstance(schema, dict):
        draft = schema.get("$schema", DRAFTS[0])
        if not isinstance(draft, str) or draft.rstrip("#") not in DRAFTS:
            raise refused("#", f"has $schema {_shown(draft)}, it must be one of {', '.join(DRAFTS)}")
        if draft.rstrip("#") != DRAFTS[0] and '"prefixItems"' in json.dumps(schema):
            raise refused("#", f"has prefixItems, which its $schema does not know; write {DRAFTS[0]}")
    return schema


def _check_nesting(schema: Any) -> None:
    level, depth = [schema], 0
    while level:
        level = [inner for one in level if isinstance(one, (dict, list))
                 for inner in (one.values() if isinstance(one, dict) else one)]
        depth += 1
        if depth > MOST_NESTED:
            raise refused("#", f"has arrays and objects in each other, more than {MOST_NESTED}")


def _plain(given: Any) -> Any:
    return dict(given) if isinstance(given, Mapping) else given


def _no_constant(name: str) -> Any:
    raise ValueError(name)


def _float(text: str) -> float:
    value = float(text)
    if abs(value) == float("inf"):
        raise ValueError(text)
    return value


def bound(schema: dict[str, Any], side: str) -> tuple[Fraction | None, bool]:
    """The tighter of minimum and exclusiveMinimum (`side`: Minimum, or Maximum), and whether it is itself outside."""
    sign = 1 if side == "Minimum" else -1
    names = ((side.lower(), False), (f"exclusive{side}", True))
    given = [(sign * Fraction(repr(schema[name])), outside) for name, outside in names if name in schema]
    if not given:
        return None, False
    value, outside = max(given)
    return sign * value, outside


def kinds_of(value: Any) -> set[str]:
    """Names of `type` that a value has."""
    if isinstance(value, bool):
        return {"boolean"}
    if is_number(value):
        return {"number", "integer"} if value == int(value) else {"number"}
    return {{str: "string", list: "array", dict: "object", type(None): "null"}[type(value)]}


def same(value: Any) -> str:
    """Equal for values that JSON schema holds to be equal: 1 and 1.0, objects in any order; not 1 and true."""
    return json.dumps(_numbers(value), sort_keys=True)


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _numbers(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_numbers(one) for one in value]
    return int(value) if isinstance(value, float) and value == int(value) else value
