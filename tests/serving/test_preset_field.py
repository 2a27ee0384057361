"""The field `preset` of a request, and `--preset` of a server."""

from __future__ import annotations

import pytest
from bundles import with_decoding
from page_helpers import CHAT, ask, house_of, served

PRESETS = {"speed": {"threshold": 0.0, "max_new_tokens": 7}, "quality": {"threshold": 1.0}}


@pytest.fixture(scope="module")
def house(tiny_bundle, tmp_path_factory):
    bundle = with_decoding(tiny_bundle, tmp_path_factory.mktemp("served") / "b", {"max_new_tokens": 9}, PRESETS)
    with house_of(bundle) as house:
        yield house


@pytest.fixture(scope="module")
def server(house):
    with served(house) as address:
        yield address


def completed(server, **fields):
    return ask(f"{server}/v1/completions", {"model": "sample", "prompt": [1, 2, 3], "eos_id": -1, **fields})


def test_a_request_names_a_preset_and_its_other_fields_win(server):
    for fields, tokens in (({}, 9), ({"preset": "speed"}, 7), ({"preset": "quality"}, 9),
                           ({"preset": "speed", "max_tokens": 3}, 3), ({"preset": None}, 9),
                           ({"preset": "off", "edit_threshold": "off", "stop": []}, 9)):
        assert completed(server, **fields).json()["usage"]["completion_tokens"] == tokens, fields
    fast, said = (completed(server, **fields).json()["choices"][0]["token_ids"]
                  for fields in ({"preset": "speed"}, {"threshold": 0.0, "max_tokens": 7}))
    assert fast == said


def test_one_that_the_bundle_does_not_have_is_a_400_without_its_folder(server):
    for preset, sentence in (("fast", "preset is 'fast', but the presets of sample are speed, quality."),
                             (3, "preset is 3, it must be a name of 1 to 100 characters, or off.")):
        answer = completed(server, preset=preset)
        assert answer.status == 400 and answer.json()["error"] == {
            "message": sentence, "type": "invalid_request_error", "param": "preset", "code": None}


def test_the_page_offers_the_names(server):
    (model,) = ask(server + CHAT).json()["models"]
    (field,) = (one for one in model["options"] if one["name"] == "preset")
    assert (field["kind"], field["choices"], field["default"]) == ("choice", ["speed", "quality", "off"],
                                                                   "the bundle's, or none")
