"""`response_format` and its like: what clients of OpenAI and vLLM say becomes the options json_schema and regex."""

from __future__ import annotations

import json
import pickle
import re
from functools import partial

import jsonschema
import pytest
from json_bundle import write_json_bundle
from page_helpers import ask, house_of, served
from pydantic import ValidationError
from sharing import once

from dmoe_export.bundle.reader import open_bundle
from dmoe_export.serving.schema import ChatBody, CompletionBody
from dmoe_export.serving.structured import with_structure

SCHEMA = {"type": "object", "properties": {"kind": {"enum": ["cat", "dog"]}, "n": {"type": "integer", "maximum": 9}},
          "required": ["kind", "n"], "additionalProperties": False}


def format_of(schema, **more):
    return {"type": "json_schema", "json_schema": {"name": "animal", "schema": schema, **more}}


@pytest.mark.parametrize(("said", "options"), [
    ({}, {}), ({"response_format": None}, {}), ({"response_format": {"type": "text"}}, {}),
    ({"response_format": {"type": "json_object"}}, {"json_schema": {"type": "object"}}),
    ({"response_format": format_of(SCHEMA, strict=True, description="d")}, {"json_schema": SCHEMA}),
    ({"response_format": {"type": "text"}, "regex": "a"}, {"regex": "a"}),
    ({"structured_outputs": {"json": SCHEMA, "regex": None}}, {"json_schema": SCHEMA}),
    ({"structured_outputs": {"json_object": True}}, {"json_schema": {"type": "object"}}),
    ({"structured_outputs": {"choice": ["a.b", "(é)", "a.b"]}}, {"regex": r"(?:a\.b|\(é\))"}),
    ({"structured_outputs": {"regex": "a+"}}, {"regex": "a+"}), ({"guided_choice": ["x"]}, {"regex": "x"}),
    ({"guided_json": json.dumps(SCHEMA)}, {"json_schema": json.dumps(SCHEMA)}),
    ({"guided_regex": "a"}, {"regex": "a"})])
def test_what_clients_say_becomes_an_option(said, options):
    assert with_structure({"model": "m", **said}) == {"model": "m", **options}
    assert CompletionBody.model_validate({"model": "m", "prompt": "p", **said}).options() == options
    body = ChatBody.model_validate({"model": "m", "messages": [{"role": "user", "content": "p"}], **said})
    assert pickle.loads(pickle.dumps(body.options())) == options  # as it crosses to a replica


@pytest.mark.parametrize(("said", "words"), [
    ({"response_format": {"type": "grammar"}}, "response_format must be of type text, json_object or json_schema"),
    ({"response_format": "json_object"}, "response_format must be of type"),
    ({"response_format": {"type": "json_schema"}}, "response_format of type json_schema must have json_schema with"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "must have json_schema with schema"),
    ({"response_format": {"type": "json_object", "schema": {}}}, "response_format has an unknown field schema"),
    ({"response_format": format_of({}, strikt=True)}, "response_format has an unknown field strikt"),
    ({"response_format": {"type": "json_object"}, "json_schema": {}}, "response_format and json_schema both say what"),
    ({"guided_regex": "a", "structured_outputs": {"regex": "a"}}, "guided_regex and structured_outputs both say"),
    ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs must have one of"),
    ({"structured_outputs": []}, "structured_outputs must be an object"),
    ({"structured_outputs": {"json_object": False}}, "structured_outputs with json_object is not offered"),
    ({"structured_outputs": {"grammar": "x"}}, "structured_outputs with grammar is not offered here"),
    ({"guided_choice": []}, "guided_choice must have a list of texts"),
    ({"guided_choice": ["a", ""]}, "guided_choice must have a list of texts"),
    ({"guided_choice": ["ab" * 300_000, "c"]}, "guided_choice has too much text"),
    ({"guided_grammar": "x"}, "Unknown field: guided_grammar")])
def test_what_means_nothing_is_refused(said, words):
    with pytest.raises(ValidationError, match=re.escape(words)):
        CompletionBody.model_validate({"model": "m", "prompt": "p", **said})


@pytest.fixture(scope="module")
def server(sample_bundle, run_folder):
    folder = once(run_folder / "exports" / "json-sample", partial(write_json_bundle, sample_bundle))
    with house_of(open_bundle(folder)) as house, served(house) as address:
        yield address


def completed(server, **fields):
    return ask(f"{server}/v1/completions", {"model": "sample", "prompt": "name", "max_tokens": 60, **fields})


def test_an_answer_is_valid_and_ends_with_stop(server):
    (choice,) = completed(server, response_format=format_of(SCHEMA)).json()["choices"]
    assert choice["finish_reason"] == "stop"
    jsonschema.validate(json.loads(choice["text"]), SCHEMA)
    (choice,) = completed(server, structured_outputs={"choice": ["a cat", "a dog"]}).json()["choices"]
    assert choice["text"] in ("a cat", "a dog") and choice["finish_reason"] == "stop"
    (choice,) = completed(server, response_format={"type": "json_object"}).json()["choices"]
    assert isinstance(json.loads(choice["text"]), dict)


def test_where_the_budget_ends_first_the_reason_is_length(server):
    (choice,) = completed(server, json_schema={"type": "string", "minLength": 500}, max_tokens=30).json()["choices"]
    assert choice["finish_reason"] == "length" and choice["text"].startswith('"')


def test_a_schema_that_cannot_be_used_is_a_400(server):
    answer = completed(server, response_format=format_of({"not": {}}))
    assert answer.status == 400 and answer.json()["error"] == {
        "message": "json_schema cannot be used: # has the keyword not, which is not supported; leave it out.",
        "type": "invalid_request_error", "param": "json_schema", "code": None}
