"""Provisional states: on their own endpoint, in order, beside committed text that equals the offline answer."""

from __future__ import annotations

from itertools import pairwise

import pytest
from page_helpers import CHAT, ask, house_of, served

from dmoe_export.bundle.reader import Bundle
from dmoe_export.decoding.defaults import Defaults
from dmoe_export.decoding.settings import OPTIONS
from dmoe_export.serving.schema import ChatBody
from dmoe_export.text.pieces import Pieces

QUESTION = "there are 16 pens in a box. max gets 4 more pens and then max loses 14 of the pens. how many pens are left?"
SLOW = {"acceptance": "fixed", "steps": 8, "eos_id": -1, "max_new_tokens": 48}  # two blocks and more, of 8 steps


@pytest.fixture(scope="module")
def house(sample_bundle):
    with house_of(sample_bundle) as house:
        yield house


@pytest.fixture(scope="module")
def server(house):
    with served(house) as url:
        yield url


def posted(server, path=CHAT, question=QUESTION, **fields):
    return ask(server + path, {"model": "sample", "messages": [{"role": "user", "content": question}], **fields})


def test_states_come_in_order_and_committed_text_is_the_offline_answer(server, house):
    response = posted(server, **SLOW)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.events()
    states = [data for name, data in events if name == "step"]
    blocks = [data for name, data in events if name == "block"]
    offline = house.models["sample"].generator.generate(QUESTION, **SLOW)[0]
    assert "".join(block["text"] for block in blocks) == offline.text
    assert [i for block in blocks for i in block["token_ids"]] == offline.token_ids
    name, done = events[-1]
    assert name == "done" and done["finish_reason"] == "length" and done["usage"]["completion_tokens"] == 48
    assert len(states) == done["statistics"]["executed_forwards"] == states[-1]["executed_forwards"]
    assert [state["executed_forwards"] for state in states] == list(range(1, len(states) + 1))
    for before, after in pairwise(states):
        if before["block"] == after["block"]:  # what is decided stays, as nothing is edited here
            assert all(a in (-1, b) for a, b in zip(before["token_ids"], after["token_ids"], strict=True))
    for state in states:
        assert len({len(state[key]) for key in ("token_ids", "candidates", "confidence", "pieces")}) == 1
        assert len(state["unique_experts"]) == 3 and all(0 < n <= 32 for n in state["unique_experts"])
        assert all(state["token_ids"][i] >= 0 for i in state["new"])


def test_the_last_state_of_each_block_is_what_is_committed(server):
    events = posted(server, **SLOW).events()
    for (name, state), (following, block) in pairwise(events):
        if name == "step" and following == "block":
            assert state["token_ids"] == block["token_ids"]


def test_other_streams_hold_no_state(server):
    body = {"stream": True, **SLOW}
    said = posted(server, "/v1/chat/completions", **body).text
    assert "confidence" not in said and "token_ids" not in said and "event:" not in said


@pytest.mark.parametrize("fields,sentence", [
    ({"n": 2}, "n is 2, but /v1/chat/denoising shows one answer; leave it out."),
    ({"stream": False}, "stream is false, but /v1/chat/denoising answers with events; leave it out."),
    ({"thresold": 0.5}, "Unknown field: thresold."),
    ({"threshold": 2}, "threshold is 2, it must be between 0 and 1.")])
def test_what_it_refuses(server, fields, sentence):
    response = posted(server, **fields)
    assert response.status == 400 and response.json()["error"]["message"] == sentence


def test_a_request_that_fails_ends_with_an_error_event(server, house, monkeypatch):
    backend = house.models["sample"].generator.backend

    def broken(*_):
        raise RuntimeError("a secret of the machine")

    monkeypatch.setattr(backend, "forward", broken)
    name, data = posted(server).events()[-1]
    assert name == "error" and data["error"]["type"] == "server_error" and "secret" not in str(data)
    monkeypatch.undo()
    assert posted(server).events()[-1][0] == "done"


def test_the_page_learns_of_every_setting_that_a_body_takes(server):
    (model,) = ask(server + CHAT).json()["models"]
    assert model["id"] == "sample" and model["experts"] == 32 and model["block_length"] == 32
    named = {one["name"]: one for one in model["options"]}
    assert named.keys() == OPTIONS.keys() - {"logprobs"} and named.keys() <= ChatBody.model_fields.keys()
    assert named["cache"]["kind"] == "choice" and named["cache"]["choices"][:2] == ["auto", "block"]
    assert named["early_stop"]["kind"] == "boolean" and named["threshold"]["kind"] == "number"
    assert named["edit_passes"]["kind"] == "integer" and named["edit_passes"]["default"] == "16"
    assert named["stop"]["kind"] == "text"


def test_a_bundle_default_is_shown_as_the_default(server, house, monkeypatch):
    generator = house.models["sample"].generator
    manifest = generator.bundle.manifest.model_copy(update={"decode_defaults": {"temperature": 0.25}})
    monkeypatch.setattr(generator, "defaults", Defaults(Bundle(generator.bundle.folder, manifest)))
    (model,) = ask(server + CHAT).json()["models"]
    assert next(one for one in model["options"] if one["name"] == "temperature")["default"] == "0.25"


def test_states_need_a_key_where_answers_do(house):
    with served(house, keys=["k"]) as locked:
        assert posted(locked).status == 401 and ask(locked + CHAT).status == 401


def test_pieces_are_read_after_the_token_before_them(house):
    codec = house.models["sample"].generator.text
    ids = codec.encode_literal("16 + 4 = 20, 20 - 14 = 6 pens")
    pieces = Pieces(codec)
    assert "".join(pieces.of(0, ids[:7]) + pieces.of(1, ids[7:])) == codec.decode(ids)
    assert Pieces(codec).of(0, [-1, ids[0], -1])[::2] == ["", ""]
    assert Pieces(None).of(0, [5, -1, 6]) == ["5,", "", "6,"]
