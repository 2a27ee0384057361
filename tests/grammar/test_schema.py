"""JSON schemas as regular expressions: whatever matches is JSON and valid, and what cannot be is refused."""

from __future__ import annotations

import json
import random
import re
import time
from functools import cache

import jsonschema
import pytest
from schema_helpers import Texts, schema, with_references

from dmoe_export.errors import RequestError
from dmoe_export.grammar.schema import regex_of_schema
from dmoe_export.grammar.schema.formats import FORMATS as KNOWN

FORMATS = jsonschema.Draft202012Validator.FORMAT_CHECKER


# Why a schema of `schema_helpers` may be refused; "at once": of oneOf, beside types that its branches do not have.
MAY_BE = ("admits no text", "minProperties", "comes to", "at once")


def check(made, texts: Texts, rng: random.Random, lengths) -> None:
    validator = jsonschema.Draft202012Validator(made, format_checker=FORMATS)
    for length in lengths:
        text = texts.draw(rng, length).decode()
        errors = list(validator.iter_errors(json.loads(text)))
        assert not errors, (made, text, errors[0].message)


def test_random_texts_of_random_schemas_are_valid():
    rng, used = random.Random(0), 0
    for number in range(540):
        made = with_references(rng) if number % 12 == 0 else schema(rng)
        try:
            regex = regex_of_schema(made)
        except RequestError as error:
            assert any(words in str(error) for words in MAY_BE), (made, error)
            continue
        check(made, Texts(regex), rng, (0, 5, 30, 90))
        used += 1
    assert used >= 500


@cache
def texts_of(made: str) -> Texts:
    return Texts(regex_of_schema(made))


def matches(made, value) -> bool:
    """A text as it is, another value as `json.dumps` writes it."""
    text = value if isinstance(value, Text) else json.dumps(value, ensure_ascii=False)
    return texts_of(json.dumps(made)).matches(text)


class Text(str):
    """JSON text."""


ANIMAL = {"title": "Animal", "type": "object", "properties": {
    "name": {"type": "string", "minLength": 1, "description": "its name"}, "legs": {"type": "integer", "minimum": 0},
    "born": {"anyOf": [{"type": "string", "format": "date"}, {"type": "null"}], "default": None},
    "tags": {"type": "array", "items": {"enum": ["big", "old"]}, "maxItems": 2}}, "required": ["name"]}
TREE = {"$ref": "#/definitions/node", "definitions": {"node": {"type": "object", "additionalProperties": False,
        "properties": {"v": {"type": "number"}, "kids": {"type": "array", "items": {"$ref": "#/definitions/node"}}},
        "required": ["v"]}}}
PAIR = {"type": "array", "prefixItems": [{"type": "string"}, {"type": "number"}], "items": {"type": "null"}}
LINE = {"type": "object", "properties": {"next": {"$ref": "#"}}}
YES = [
    (ANIMAL, {"name": "Ada"}),
    (ANIMAL, {"name": "größe \"x\" \\ \n\t/😀", "legs": 4, "born": "2024-02-29", "tags": ["big"]}),
    (ANIMAL, {"name": "x", "born": None, "tags": []}), (ANIMAL, Text('{"name":"x","tags":["big", "old"]}')),
    (TREE, {"v": 1.5e-7, "kids": [{"v": -0.0, "kids": [{"v": 1e22}]}]}), (PAIR, ["a", 1, None, None]), (PAIR, []),
    (LINE, {"next": {"next": {}}}),
    ({}, {"a": [1, "x", None], "c": {}}), (True, []), ({"type": "object"}, {"a": {"b": [1, 2]}}),
    ({"type": "string"}, "\u2028\u007f\ud7ff\uffff\b\f"), ({"maxLength": 2}, "😀😀"), ({"maxLength": 2}, '"\n'),
    ({"type": "integer"}, -999999999999999), ({"type": "integer", "minimum": -3, "maximum": 12}, -3),
    ({"type": "number", "minimum": 0}, 123456789.25), ({"type": "number", "exclusiveMinimum": 0, "maximum": 1}, 1.0),
    ({"type": "number", "exclusiveMinimum": 0, "maximum": 1}, 1e-4), ({"type": "number"}, 1e-99),
    ({"type": "number", "minimum": -1.5, "maximum": -1.25}, -1.5), ({"const": {"a": [1.5, "é\u0001"]}},
                                                                    Text('{"a":[1.5, "é\\u0001"]}')),
    ({"pattern": "^a.c$"}, "a\tc"), ({"pattern": "b{2}"}, "abbbc"), ({"pattern": "^[\"\\\\]+$"}, '"\\'),
    ({"pattern": "^x{2,}$", "maxLength": 4}, "xxxx"), ({"pattern": "^ab*c$", "minLength": 4}, "abbc"),
    ({"pattern": "^(a|bb)?$"}, ""), ({"format": "date-time"}, "1999-12-31T23:59:59.25+01:00"),
    ({"format": "email"}, "ada.l+x@mail.example.org"), ({"format": "uri"}, "https://example.org/a/b.html?q=1"),
    ({"format": "ipv4"}, "255.10.0.1"), ({"format": "uuid"}, "123e4567-e89b-12d3-a456-426614174000"),
    ({"type": "object", "additionalProperties": {"type": "integer"}, "propertyNames": {"maxLength": 1}}, {"a": 1,
    "b": 2}),
    ({"type": ["integer", "null"]}, None),
    ({"properties": {"a": {"type": "null"}, "b": {}}, "additionalProperties": False,
      "anyOf": [{"required": ["a"]}, {"required": ["b"]}]}, {"b": 1}),
    ({"type": "array", "minItems": 2, "maxItems": 3, "items": {"const": 1}}, [1, 1]),
    ({"type": "object", "required": ["z"], "properties": {"a": {}}}, {"a": 1, "z": [2]})]
NO = [
    (ANIMAL, {"name": ""}), (ANIMAL, {"name": "x", "legs": -1}), (ANIMAL, {"name": "x", "born": "2023-02-29"}),
    (ANIMAL, {"name": "x", "more": 1}), (ANIMAL, {"legs": 1, "name": "x"}),
    (ANIMAL, {"name": "x", "tags": ["big"] * 3}),
    (ANIMAL, Text('{"name":  "x"}')), (ANIMAL, Text('{"name": "x" }')), (ANIMAL, Text('{"name": "\n"}')),
    ({"type": "integer"}, Text("-0")), ({"type": "integer"}, Text("01")), ({"type": "integer"}, 1.0),
    ({"type": "integer"}, 10**15), ({"type": "number"}, Text(".5")), ({"type": "number"}, Text("1.")),
    ({"type": "number", "exclusiveMaximum": 1}, Text("0.99999999999999999999")), ({"type": "number"}, Text("1e999")),
    ({"type": "number", "exclusiveMinimum": 0}, 0), ({"type": "number", "exclusiveMinimum": 0}, Text("0.000")),
    ({"type": "number", "minimum": 0}, Text("-0.0")), ({"minLength": 3}, "😀😀"),
    ({"type": "string"}, Text('"\\ud800"')),
    ({"type": "string"}, Text('"\\u0041"')), ({"pattern": "^a.c$"}, "a\nc"), ({"pattern": "^a$"}, "a\n"),
    ({"pattern": "^[^a]$"}, "a"), ({"pattern": "^[^\\d]$"}, "\u0664"),
    ({"pattern": "^x{2,}$", "maxLength": 4}, "x" * 5),
    ({"const": 1}, True), ({"const": True}, 1), ({"enum": ["a"]}, "A"), ({"type": "null"}, 0),
    ({"type": "array", "minItems": 1}, []), ({"type": "object", "minProperties": 1}, {}),
    ({"type": "object", "properties": {"a": {}, "b": {}}, "minProperties": 1}, {}), ({"format": "date"}, "2024-04-31"),
    ({"format": "ipv4"}, "256.0.0.1"), ({"format": "time"}, "12:00:00")]


@pytest.mark.parametrize(("made", "value"), YES)
def test_usual_texts_match(made, value):
    assert matches(made, value)


@pytest.mark.parametrize(("made", "value"), NO)
def test_what_is_invalid_or_written_otherwise_does_not(made, value):
    assert not matches(made, value)


def test_bounds_are_met_at_every_digit():
    """All decimals of few digits around random bounds, against the comparison itself."""
    rng = random.Random(2)
    for _ in range(12):
        low, high = sorted(rng.choice([rng.randint(-130, 130), round(rng.uniform(-12, 12), rng.randint(0, 3))])
                           for _ in range(2))
        open_low, open_high, kind = rng.random() < 0.5, rng.random() < 0.5, rng.choice(["integer", "number"])
        made = {"type": kind, "exclusiveMinimum" if open_low else "minimum": low,
                "exclusiveMaximum" if open_high else "maximum": high}
        values = range(-1400, 1400)
        inside = [n for n in values if (low < n / 10 or (low == n / 10 and not open_low))
                  and (n / 10 < high or (n / 10 == high and not open_high)) and (kind == "number" or n % 10 == 0)]
        try:
            texts = Texts(regex_of_schema(made))
        except RequestError as error:
            assert "admits no text" in str(error) and not inside
            continue
        written = {n: str(n // 10 if n >= 0 else -(-n // 10)) if n % 10 == 0 else str(n / 10) for n in values}
        assert [n for n in values if texts.matches(written[n])] == inside, made


REFUSED = [
    ({name: value}, f"has the keyword {name}, which is not supported") for name, value in {
        "not": {}, "if": {}, "then": {}, "contains": {}, "minContains": 1, "patternProperties": {},
        "dependentRequired": {},
        "dependentSchemas": {}, "unevaluatedProperties": False, "unevaluatedItems": False, "$anchor": "x",
        "nullable": True,
        "$dynamicRef": "#x", "additionalItems": False, "contentEncoding": "base64", "propertyOrdering": []}.items()] + [
    ({"properties": {"a": {"$id": "x"}}}, "#/properties/a has the keyword $id"),
    ({"type": "text"}, "has type \"text\", it"),
    ({"type": []}, "has type [], it must"),
    ({"minLength": -1}, "has minLength -1, it must be a number without fraction"),
    ({"minLength": True}, "minLength true"), ({"maximum": "3"}, 'has maximum "3", it must be a number'),
    ({"exclusiveMinimum": True}, "exclusiveMinimum true"), ({"multipleOf": 0.5}, "must be 1, as other multiples"),
    ({"uniqueItems": True}, "has uniqueItems true, it must be false"),
    ({"items": [{}]}, "a list of them is prefixItems"),
    ({"enum": []}, "has enum [], it must"), ({"enum": ["a"], "minLength": 2}, "has minLength beside enum or const"),
    ({"format": "hostname"}, "has format hostname, which is not supported"),
    ({"format": "date", "maxLength": 3}, "a pattern or a length beside format date, of 10 to 10"),
    ({"properties": {"a": 3}}, "an object of schemas"),
    ({"required": [1]}, "a list of names"), ({"anyOf": []}, "a list of schemas"),
    ({"$ref": "other.json"}, "only pointers such as"), ({"$ref": "#/$defs/x"}, "leads to no schema of this document"),
    ({"$schema": "http://json-schema.org/draft-04/schema#"}, "has $schema"),
    ({"$schema": "http://json-schema.org/draft-07/schema", "prefixItems": [{}]}, "which its $schema does not know"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "has branches 0 and 1 that may hold at once"),
    ({"type": "object", "properties": {"a": {}, "b": {}}, "oneOf": [{"required": ["a"]}, {"required": ["b"]}]},
    "at once"),
    ({"oneOf": [{"properties": {"a": {"const": 1}}}, {"properties": {"a": {"const": 2}}}]}, "at once"),
    ({"type": "object", "minProperties": 2}, "minProperties above 1 and no properties"),
    ({"properties": {"a": {}, "b": {}}, "maxProperties": 1}, "that its properties can miss"),
    ({"properties": {"a": {}}, "propertyNames": {}}, "has propertyNames beside properties"),
    ({"allOf": [{"pattern": "a"}, {"pattern": "b"}]}, "has pattern twice"),
    ({"allOf": [{"properties": {"a": {}}}, {"additionalProperties": False}]},
    "joins additionalProperties with properties"),
    ({"allOf": [{"items": {"type": "null"}}, {"prefixItems": [{}]}]}, "joins items with prefixItems"),
    ({"oneOf": [{"properties": {"a": {}}, "required": ["a"]}, {"properties": {"b": {}}, "required": ["b"]}],
      "anyOf": [{"properties": {"b": {}}}, {"type": "null"}]}, "at once"),
    ({"type": "object", "oneOf": [{"properties": {"a": {}}, "required": ["a"], "anyOf": [{"properties": {"b": {}}}]},
                                  {"properties": {"b": {}}, "required": ["b"]}]}, "at once"),
    ({"minimum": 3, "maximum": 2}, "admits no text"), (False, "admits no text"), ({"$ref": "#"}, "admits no text"),
    ({"properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "admits no text"),
    ({"additionalProperties": False, "required": ["a"]}, "admits no text"),
    ({"minimum": 1e15, "type": "number"}, "admits no"),
    ({"type": "integer", "minimum": 0.5, "maximum": 0.7}, "admits no text"), ({"pattern": "^\x01$"}, "admits no text"),
    ({"type": "string", "allOf": [{"type": "null"}]}, "admits no text")] + [
    ({"pattern": pattern}, f"# has a pattern that {words}") for pattern, words in {
        "(?=a)b": "has (?=", "(?<n>a)": "has (?<", "(a)\\1": "has \\1", "\\bx": "has \\b", "\\p{L}": "has \\p",
        "a(^b)": "has ^",
        "a$b": "has b where it is not supported; anchors", "(": "has a group without an end",
        "a)": "has a parenthesis too many", "*a": "has * with nothing",
        "a**": "repeats a repetition", "a{,3}": "has { without numbers", "a{4,2}": "repeats {4,2} times, which is none",
        "[]": "has an empty class", "[a": "has a class of characters without", "[z-a]": "has a range of characters",
        "[a-\\d]": "has a range", "\\ud800": "has \\ud800", "a{1001}": "repeats {1001} times, more than",
        "\\": "has \\,",
        "(" * 30: "has groups in groups", "x" * 1001: "has 1001 characters", "\\cA": "has \\c",
        "\\u00": "has \\u00"}.items()] + [
    ({"pattern": "a", "maxLength": 3}, "does not go with minLength and maxLength")]


@pytest.mark.parametrize(("made", "words"), REFUSED)
def test_what_is_not_supported_is_refused_by_name(made, words):
    with pytest.raises(RequestError, match=re.escape(words)) as error:
        regex_of_schema(made)
    assert re.fullmatch(r"json_schema cannot be used: #\S* .*\.", str(error.value), flags=re.DOTALL)


def _nested(inner, levels):
    for _ in range(levels):
        inner = {"type": "array", "items": inner, "maxItems": 1}
    return inner


def _chain(many):
    return {"$ref": "#/$defs/0", "$defs": {str(i): many({"$ref": f"#/$defs/{i + 1}"}) for i in range(25)} | {"25": {}}}


HOSTILE = [
    {"maxLength": 10**12}, {"minLength": 10**6}, {"type": "array", "items": {"maxLength": 900}, "minItems": 900},
    {"pattern": "((((a{0,99}){0,99}){0,99}){0,99})"}, _nested({}, 60), {"const": json.loads("[" * 300 + "]" * 300)},
    _chain(lambda ref: {"prefixItems": [ref, ref]}), _chain(lambda ref: {"anyOf": [ref, ref, ref]}),
    _chain(lambda ref: {"allOf": [ref, ref]}), _chain(lambda ref: {"properties": {"a": ref, "b": ref}}),
    _chain(lambda ref: {"oneOf": [ref, ref]}), "[" * 10**6, '{"a":' * 10**4, '{"minimum": ' + "9" * 9999 + "}",
    '{"minimum": NaN}', '{"maximum": 1e999}', "", "[1]", "3", '{"x": "' + "x" * 10**6 + '"}',
    {"anyOf": [{"$ref": "#/$defs/e"}] * 3000, "$defs": {"e": {"type": "null", "enum": list(range(9000))}}},
    {"anyOf": [{"$ref": "#/$defs/e"}] * 3000,
     "$defs": {"e": {"type": "null", "const": {str(i): i for i in range(4000)}}}},
    {"oneOf": [{"enum": list(range(i, 5000, 70))} for i in range(70)] * 2},
    {"$defs": {name: {"properties": {n: {"$ref": f"#/$defs/{n}"} for n in "abcdefgh"}} for name in "abcdefgh"},
     "$ref": "#/$defs/a"}, {"enum": [str(i) * 30 for i in range(3000)] * 2}]


@pytest.mark.parametrize("made", HOSTILE, ids=range(len(HOSTILE)))
def test_what_is_hostile_is_refused_before_it_costs(made):
    start = time.process_time()
    with pytest.raises(RequestError, match=r"^json_schema [^\n]{10,500}\.$"):
        regex_of_schema(made)
    assert time.process_time() - start < 2


def _damaged(rng: random.Random, made):
    """With a part in the place of another, or a keyword under the name of another."""
    if not isinstance(made, (dict, list)) or not made or rng.random() < 0.15:
        return rng.choice([True, False, None, 0, -1, 2.5, 10**400, "", "a", "#", "#/$defs/one", [], {}, ["a"], [{}],
                           {"a": 1}])
    names = list(made) if isinstance(made, dict) else range(len(made))
    place = rng.choice(names)
    copied = made.copy()
    if isinstance(made, dict) and rng.random() < 0.2:
        copied[rng.choice(WORDS)] = copied.pop(place)
    else:
        copied[place] = _damaged(rng, made[place])
    return copied


WORDS = [*ANIMAL, "items", "prefixItems", "minItems", "additionalProperties", "propertyNames", "$ref", "allOf", "anyOf",
         "oneOf", "const", "enum", "minimum", "pattern", "format", "maxLength", "not"]


def test_damaged_schemas_are_refused_or_sound():
    rng, used = random.Random(3), 0
    for number in range(1500):
        made = _damaged(rng, with_references(rng) if number % 4 == 0 else schema(rng, 1))
        try:
            regex = regex_of_schema(made)
        except RequestError as error:
            assert str(error).startswith("json_schema "), error
            continue
        if isinstance(made, dict) and number % 5 == 0 and len(regex) < 5000:
            check(made, Texts(regex), rng, (0, 30))
            used += 1
    assert used > 40


def test_formats_have_the_lengths_that_are_told():
    for name, form in KNOWN.items():
        texts, far = Texts(form.piece.text), {}
        assert texts.far[texts.start] == form.fewest, name

        def longest(state, texts=texts, far=far):
            if state not in far:
                far[state] = max((1 + longest(after) for after in texts.after(state).values()), default=0)
            return far[state]

        assert longest(texts.start) == form.most, name


def test_what_is_given_stays_as_it_is():
    made = {"type": "object", "properties": {"a": {"allOf": [{"minLength": 1}, {"minLength": 2}]}}, "required": ["b"]}
    before = json.dumps(made)
    assert regex_of_schema(made) == regex_of_schema(before) and json.dumps(made) == before
