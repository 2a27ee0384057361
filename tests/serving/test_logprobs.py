"""Probabilities over HTTP, in the shapes of OpenAI's two endpoints, whole and streamed."""

from __future__ import annotations

import math
import pickle

import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from serving import serving

from dmoe_export.decoding.probabilities import Likely, TokenProbability
from dmoe_export.generator import Generator
from dmoe_export.serving.asked import Piece
from dmoe_export.serving.logprobs import Columns, of_chat

QUESTION = [{"role": "user", "content": "reverse the list 3 1 4 7."}]
LONG = {"max_tokens": 40, "extra_body": {"eos_id": -1, "threshold": 0.99}}


@pytest.fixture(scope="module")
def served(sample_bundle):
    with serving(sample_bundle.folder, "--name", "sample", "--threads", 1) as one:
        yield one


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0)


@pytest.fixture(scope="module")
def wanted(sample_bundle):
    with Generator.open(sample_bundle.folder, threads=1) as generator:
        return generator.generate([QUESTION], max_new_tokens=40, eos_id=-1, threshold=0.99, logprobs=3)[0]


def entry(one):
    return {"token": one.token, "logprob": pytest.approx(one.logprob, abs=1e-5), "bytes": list(one.utf8)}


def test_chat_whole_and_streamed(client, wanted):
    asked = {"model": "sample", "messages": QUESTION, "logprobs": True, "top_logprobs": 3, **LONG}
    answer = client.chat.completions.create(**asked)
    said = ChatCompletion.model_validate(answer.model_dump()).choices[0].logprobs.content
    assert [one.model_dump() for one in said] == [
        entry(one) | {"top_logprobs": [entry(other) for other in one.top]} for one in wanted.probabilities]
    text = bytes(byte for one in said for byte in one.bytes).decode()
    assert text.removeprefix(" ") == answer.choices[0].message.content == wanted.text
    events = list(client.chat.completions.create(**asked, stream=True))
    parts = [ChatCompletionChunk.model_validate(one.model_dump()).choices[0].logprobs.content for one in events]
    assert [one for part in parts for one in part] == said and len(parts) > 1
    assert all(one.logprobs is None for one in client.chat.completions.create(
        model="sample", messages=QUESTION, logprobs=False, max_tokens=8).choices)
    alone = client.chat.completions.create(model="sample", messages=QUESTION, logprobs=True, max_tokens=8)
    assert all(one.top_logprobs == [] for one in alone.choices[0].logprobs.content)


def test_completions_whole_and_streamed(client, wanted, sample_bundle):
    with Generator.open(sample_bundle.folder, threads=1) as generator:
        prompt = generator.text.encode_chat(QUESTION)
    asked = {"model": "sample", "prompt": prompt, "logprobs": 2, **LONG}
    answer = client.completions.create(**asked)
    said = Completion.model_validate(answer.model_dump()).choices[0].logprobs
    assert said.tokens == [one.token for one in wanted.probabilities]
    assert said.token_logprobs == pytest.approx([one.logprob for one in wanted.probabilities], abs=1e-5)
    assert [list(one) for one in said.top_logprobs] == [[other.token for other in one.top[:2]]
                                                        for one in wanted.probabilities]
    blank = " " + answer.choices[0].text  # the decoder strips it
    placed = list(zip(said.text_offset, wanted.probabilities, strict=True))
    assert all(blank[at:at + len(one.token)] == one.token for at, one in placed if one.utf8)
    assert {at for at, one in placed if not one.utf8} == {len(blank)}  # end tokens that end nothing here
    parts = [event.choices[0].logprobs for event in client.completions.create(**asked, stream=True)]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [one for part in parts for one in getattr(part, name)] == getattr(said, name)
    alone = client.completions.create(**asked | {"logprobs": 0}).choices[0].logprobs
    assert alone.top_logprobs is None and alone.token_logprobs == said.token_logprobs
    for off in (None, "off", False):
        more = {"model": "sample", "prompt": prompt, "max_tokens": 8, "extra_body": {"logprobs": off}}
        assert client.completions.create(**more).choices[0].logprobs is None


def test_every_choice_has_its_own_cut_as_its_tokens_are(client):
    asked = {"model": "sample", "messages": QUESTION, "n": 4, "temperature": 6.0, "seed": 7, "stop": ["1"],
             "max_tokens": 40, "extra_body": {"threshold": 0.1}}
    answer = client.chat.completions.create(logprobs=True, top_logprobs=1, **asked)
    assert len({one.message.content for one in answer.choices}) > 1
    for one in answer.choices:
        said = one.logprobs.content
        text = bytes(byte for token in said for byte in token.bytes).decode().removeprefix(" ")
        assert text.startswith(one.message.content) and "1" not in text[:-1]
    assert answer.usage.completion_tokens == sum(len(one.logprobs.content) for one in answer.choices)
    plain = client.chat.completions.create(**asked)
    assert [one.message.content for one in plain.choices] == [one.message.content for one in answer.choices]


@pytest.mark.parametrize(("path", "more", "words", "param"), [
    ("chat/completions", {"logprobs": 2}, "logprobs: Input should be a valid boolean.", "logprobs"),
    ("chat/completions", {"logprobs": "off"}, "logprobs: Input should be a valid boolean.", "logprobs"),
    ("chat/completions", {"top_logprobs": 2}, "top_logprobs belongs to logprobs; give logprobs: true, too.",
     "top_logprobs"),
    ("chat/completions", {"logprobs": False, "top_logprobs": 2}, "top_logprobs belongs to logprobs", "top_logprobs"),
    ("chat/completions", {"logprobs": True, "top_logprobs": 21}, "top_logprobs: ", "top_logprobs"),
    ("chat/completions", {"logprobs": True, "top_logprobs": True}, "top_logprobs: ", "top_logprobs"),
    ("completions", {"logprobs": True}, "logprobs is True, it must be an integer, or off.", "logprobs"),
    ("completions", {"logprobs": 21}, "logprobs is 21, it must be between 0 and 20, or off.", "logprobs"),
    ("completions", {"logprobs": 1, "top_logprobs": 2}, "top_logprobs is not offered here", "top_logprobs"),
    ("chat/denoising", {"logprobs": True}, "/v1/chat/denoising shows confidences; leave it out.", "logprobs")])
def test_refused_in_one_sentence(served, path, more, words, param):
    prompt = {"prompt": "what is"} if path == "completions" else {"messages": QUESTION}
    status, _, answer = served.ask("POST", f"/v1/{path}", {"model": "sample", **prompt, **more})
    assert (status, answer["error"]["param"]) == (400, param) and words in answer["error"]["message"]


def token(i, utf8, logprob=-0.5, top=(), text=None):
    return TokenProbability(i, logprob, utf8.decode("utf-8", "replace") if text is None else text, utf8, 0, tuple(top))


def test_parts_of_characters_special_tokens_and_unknown_bytes():
    """"é✓": two bytes and three; the tokens end in the middle of both, over two pieces."""
    said = [token(1, b"a\xc3"), token(2, b"\xa9\xe2"), token(3, b"", text="<end>"), token(4, b"\x9c\x93!")]
    columns = Columns()
    first, second = columns.of(said[:2]), columns.of(said[2:])
    assert first["tokens"] == ["bytes:\\x61\\xc3", "bytes:\\xa9\\xe2"] and second["tokens"][0] == "<end>"
    assert first["text_offset"] + second["text_offset"] == [0, 1, 2, 2] and first["top_logprobs"] is None
    entries = of_chat(said)["content"]
    assert entries[0] == {"token": "a\ufffd", "logprob": -0.5, "bytes": [97, 0xc3], "top_logprobs": []}
    assert bytes(byte for one in entries for byte in one["bytes"]).decode() == "aé✓!"
    other = Likely(9, -3.0, "word", None)
    unknown = TokenProbability(8, None, "word", None, None, (other,))
    assert of_chat([unknown])["content"][0] == {
        "token": "word", "logprob": None, "bytes": None,
        "top_logprobs": [{"token": "word", "logprob": -3.0, "bytes": None}]}
    assert of_chat([TokenProbability(8, -1.0)])["content"][0]["token"] == "token_id:8"
    assert of_chat(None) is None and columns.of(None) is None and of_chat([])["content"] == []


def test_of_two_tokens_of_one_name_the_more_probable_is_told():
    tops = [Likely(1, -0.1, "A", b"A"), Likely(2, -2.0, "B", b"B"), Likely(3, -5.0, "A", b"A")]
    assert list(Columns().of([token(1, b"A", top=tops)])["top_logprobs"][0].items()) == [("A", -0.1), ("B", -2.0)]


def test_it_crosses_between_processes(wanted):
    piece = Piece(0, wanted.token_ids, wanted.text, "length", None, wanted.probabilities)
    assert pickle.loads(pickle.dumps(piece)) == piece
    assert math.isfinite(sum(one.logprob for one in wanted.probabilities))
