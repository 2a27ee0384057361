"""JSON schemas as regular expressions: whatever matches is JSON and valid, and what cannot be is refused."""

from __future__ import annotations

import json
import random

import jsonschema
from schema_helpers import Texts, schema, with_references

from dmoe_export.errors import RequestError
from dmoe_export.grammar.schema import regex_of_schema

FORMATS = jsonschema.Draft202012Validator.FORMAT_CHECKER


def check(made, texts: Texts, rng: random.Random, lengths) -> None:
    validator = jsonschema.Draft202012Validator(made, format_checker=FORMATS)
    for length in lengths:
        text = texts.draw(rng, length).decode()
        errors = list(validator.iter_errors(json.loads(text)))
        assert not errors, (made, text, errors[0].message)


def test_random_texts_of_random_schemas_are_valid():
    rng, used = random.Random(0), 0
    for number in range(520):
        made = with_references(rng) if number % 8 == 0 else schema(rng)
        try:
            regex = regex_of_schema(made)
        except RequestError as error:
            assert "admits no text" in str(error) or "minProperties" in str(error), (made, str(error))
            continue
        check(made, Texts(regex), rng, (0, 5, 30, 90))
        used += 1
    assert used >= 500
