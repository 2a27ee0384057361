"""Answers of the sample to schemas of which its model knows nothing: all are valid, or end with their budget."""

from __future__ import annotations

import json
import random
from collections import Counter
from functools import partial
from time import perf_counter

import jsonschema
import pytest
from json_bundle import write_json_bundle
from schema_helpers import schema, with_references
from sharing import once

from dmoe_export.decoding.settings import ACCEPTANCES
from dmoe_export.errors import RequestError
from dmoe_export.generator import Generator

ROWS = 5
PROMPTS = ["what is 2 plus 3?", "capital of france", "count from 1 to 9", "emma has 3 red apples", "is coal black?"]


@pytest.fixture(scope="module")
def speller(sample_bundle, run_folder):
    folder = once(run_folder / "exports" / "json-sample", partial(write_json_bundle, sample_bundle))
    with Generator.open(folder) as generator:
        yield generator


def made(rng):
    return with_references(rng) if rng.random() < 0.2 else schema(rng)


def check(generator, wanted, seed=0):
    """So many schemas, in batches whose rows have other schemas, lengths and settings; how they ended."""
    rng, ends, unlike, taken = random.Random(seed), Counter(), 0, 0.0
    with Generator.open(generator.bundle.folder) as plain:
        prompts = [plain.text.encode_plain(text) for text in PROMPTS]
    while ends.total() < wanted:
        batch, rows = generator.batch(ROWS), {}
        start = perf_counter()
        while batch.free and ends.total() + len(rows) < wanted:
            asked = made(rng)
            try:
                request = generator.request(
                    rng.choice(prompts), json_schema=asked if isinstance(asked, dict) else json.dumps(asked),
                    max_new_tokens=rng.choice([24, 60, 100, 160]), cache=rng.choice(["block", "none"]),
                    acceptance=rng.choice(ACCEPTANCES), temperature=rng.choice([0, 0, 0.9]), seed=rng.randrange(99),
                    threshold=rng.choice([0.3, 0.95]), steps=rng.choice([4, 32]),
                    schedule=rng.choice(["merged", "reference"]))
            except RequestError as error:
                unlike += 1
                may_be = "admits no text", "minProperties", "matches json_schema", "comes to", "at once"
                assert any(words in str(error) for words in may_be), (asked, str(error))
                continue
            rows[batch.add(request)] = asked, []
        while len(batch):
            for event in batch.step():
                assert event.error is None, event.error
                asked, texts = rows[event.handle]
                texts.append(event.block.text)
                if not event.last:
                    continue
                ends[event.block.finish_reason] += 1
                if event.block.finish_reason != "length":
                    jsonschema.Draft202012Validator(
                        asked, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
                        ).validate(json.loads("".join(texts)))
        taken += perf_counter() - start
    print(f"{dict(ends)}, {unlike} refused, {taken / wanted:.2f} s per answer")
    assert set(ends) <= {"eos", "length"} and ends["eos"] > wanted / 5 and unlike < wanted / 5
    return ends


def test_answers_to_random_schemas_are_valid_or_out_of_budget(speller):
    check(speller, 25)


@pytest.mark.slow
def test_answers_to_500_random_schemas_are_valid_or_out_of_budget(speller):
    """`pytest -s -m slow tests/generator/test_schemas_on_the_sample.py`"""
    check(speller, 500, seed=1)
