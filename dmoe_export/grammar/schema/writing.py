"""A JSON schema as a regular expression: every text that matches is JSON, and valid under the schema.

Read as draft 2020-12. Not every valid text matches; which do is told in docs/json-schema.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import apart
from .characters import EVERY, quoted, written
from .flat import At, Flat, Reading
from .formats import FORMATS
from .keywords import bound, refused, schema_of
from .numerals import between
from .objects import COLON, elements, member, members
from .pattern import pattern_text
from .pieces import EMPTY, Piece, TooLarge, either, literal, piece, repeated, sequence

FREE_DEPTH = 2  # arrays and objects in each other where a schema asks for nothing

_QUOTE = piece('"')
_CHARACTER = written(EVERY) or EMPTY
_WORDS = {"boolean": either([piece("true"), piece("false")]), "null": piece("null")}


def regex_of_schema(schema: str | Mapping[str, Any] | bool | None) -> str:
    """The expression (syntax of Rust's crate regex, for whole texts) of a schema: JSON text, a mapping, or a bool.

    Raises RequestError for what is no schema, has a keyword that is not supported, admits nothing, or is too large.
    """
    root = schema_of(schema)
    try:
        found = _Writing(root).value(root, At("#", ("#",), 0))
    except TooLarge as error:
        raise refused("#", str(error)) from None
    if found is None:
        raise refused("#", "admits no text that can be written: its parts contradict each other, or its references "
                           "lead back into themselves without an end")
    return found.text


class _Writing(Reading):
    def value(self, schema: Any, at: At) -> Piece | None:
        """None where nothing can be written."""
        flat = self.flat([(schema, at)])
        return None if flat is None else self._flat(flat)

    def _flat(self, flat: Flat) -> Piece | None:
        if not flat.choices:
            return self._plain(flat.plain, flat.at)
        # anyOf first: the properties that it adds may be those of two branches of oneOf.
        (kind, branches, at), *rest = sorted(flat.choices, key=lambda choice: choice[0])
        if kind == "oneOf":
            apart.check(self, flat, branches, at)
        ways = []
        for number, branch in enumerate(branches):
            one = self.flat([(flat.plain, flat.at), (branch, at.into(number))])
            way = one and self._flat(Flat(one.plain, [*one.choices, *rest], one.at))
            ways += [way] if way else []
        return either(ways) if ways else None

    def _plain(self, plain: dict[str, Any], at: At) -> Piece | None:
        values = apart.values_of(plain)
        if values is not None:
            beside = next((name for name in plain if name not in ("enum", "const", "type")), None)
            if beside:
                raise refused(at.where, f"has {beside} beside enum or const; leave it out, and the values that it "
                                        "forbids")
            return either([_json(value) for value in values]) if values else None
        types = apart.types_of(plain)
        if types is None:
            return _free(FREE_DEPTH)
        ways = [way for name in types if (way := self._of_type(name, plain, at)) is not None]
        return either(ways) if ways else None

    def _of_type(self, name: str, plain: dict[str, Any], at: At) -> Piece | None:
        if name in _WORDS:
            return _WORDS[name]
        if name == "string":
            return _string(plain, at)
        if name == "array":
            return self._array(plain, at)
        if name == "object":
            return self._object(plain, at)
        (low, open_low), (high, open_high) = bound(plain, "Minimum"), bound(plain, "Maximum")
        return between(low, high, open_low, open_high, name == "integer" or "multipleOf" in plain)

    def _array(self, plain: dict[str, Any], at: At) -> Piece | None:
        first: list[Piece] = []
        for number, one in enumerate(plain.get("prefixItems", ())):
            way = self.value(one, at.into(f"prefixItems/{number}"))
            if way is None:
                return _array(elements(first, None, *_counts(plain, "Items")))
            first.append(way)
        more = self.value(plain.get("items", True), at.into("items"))
        return _array(elements(first, more, *_counts(plain, "Items")))

    def _object(self, plain: dict[str, Any], at: At) -> Piece | None:
        properties, required = plain.get("properties", {}), plain.get("required", [])
        more, (low, high) = plain.get("additionalProperties", True), _counts(plain, "Properties")
        names = list(dict.fromkeys([*properties, *required]))
        if not names:
            return self._map(plain, more, low, high, at)
        if "propertyNames" in plain:
            raise refused(at.where, "has propertyNames beside properties; leave it out")
        parts = []
        for name in names:
            where = f"properties/{name}" if name in properties else "additionalProperties"
            value = self.value(properties.get(name, more), at.into(where))
            if value is not None:
                parts.append((member(name, value), name in required))
            elif name in required:
                return None
        needed = sum(must for _, must in parts)
        if (high is not None and high < len(parts)) or (low > needed and low not in (1, len(parts))):
            raise refused(at.where, "has minProperties or maxProperties that its properties can miss; say with "
                                    "required which are there, and leave it out")
        if low == len(parts):
            parts = [(part, True) for part, _ in parts]
        return sequence(piece(r"\{"), members(parts, not low) if parts else EMPTY, piece(r"\}"))

    def _map(self, plain: dict[str, Any], more: Any, low: int, high: int | None, at: At) -> Piece | None:
        if low > 1:
            raise refused(at.where, "has minProperties above 1 and no properties, and a name may come twice; leave it "
                                    "out")
        name = self.value({"allOf": [{"type": "string"}, plain.get("propertyNames", True)]}, at.into("propertyNames"))
        value = self.value(more, at.into("additionalProperties"))
        entry = None if name is None or value is None else sequence(name, COLON, value)
        inside = elements([], entry, low, high)
        return inside and sequence(piece(r"\{"), inside, piece(r"\}"))


def _counts(plain: dict[str, Any], of: str) -> tuple[int, int | None]:
    most = plain.get(f"max{of}")
    return int(plain.get(f"min{of}", 0)), None if most is None else int(most)


def _array(inside: Piece | None) -> Piece | None:
    return inside and sequence(piece(r"\["), inside, piece(r"\]"))


def _string(plain: dict[str, Any], at: At) -> Piece | None:
    low, high = _counts(plain, "Length")
    if "format" in plain:
        name = plain["format"]
        if name not in FORMATS:
            raise refused(at.where, f"has format {name[:50]}, which is not supported; those are {', '.join(FORMATS)}")
        form = FORMATS[name]
        if "pattern" in plain or low > form.fewest or (high is not None and high < form.most):
            raise refused(at.where, f"has a pattern or a length beside format {name}, of {form.fewest} to {form.most} "
                                    "characters; leave it out")
        return sequence(_QUOTE, form.piece, _QUOTE)
    if "pattern" in plain:
        try:
            inside = pattern_text(plain["pattern"], low, high)
        except TooLarge:
            raise
        except ValueError as error:
            raise refused(at.where, f"has a pattern that {error}") from None
        return inside and sequence(_QUOTE, inside, _QUOTE)
    if high is not None and low > high:
        return None
    return sequence(_QUOTE, repeated(_CHARACTER, low, high), _QUOTE)


def _free(depth: int) -> Piece:
    """Any value of JSON with at most so many arrays and objects in each other."""
    text = sequence(_QUOTE, repeated(_CHARACTER, 0, None), _QUOTE)
    number = between(None, None, False, False, False)
    ways = [text, number or EMPTY, *_WORDS.values()]
    if depth:
        inner = _free(depth - 1)
        array, entries = elements([], inner, 0, None), elements([], sequence(text, COLON, inner), 0, None)
        ways += [sequence(piece(r"\["), array or EMPTY, piece(r"\]")),
                 sequence(piece(r"\{"), entries or EMPTY, piece(r"\}"))]
    return either(ways)


def _json(value: Any) -> Piece:
    """Exactly this value, with a space behind colons and commas or without."""
    if isinstance(value, str):
        return literal(quoted(value))
    if isinstance(value, list):
        return sequence(piece(r"\["), elements([_json(one) for one in value], None, len(value), None) or EMPTY,
                        piece(r"\]"))
    if isinstance(value, dict):
        parts = [(member(name, _json(one)), True) for name, one in value.items()]
        return sequence(piece(r"\{"), members(parts, True) if parts else EMPTY, piece(r"\}"))
    return literal({None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool)
                   else repr(value))
