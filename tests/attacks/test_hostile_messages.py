"""Prompts and messages that only look like some: one sentence each; what a template leaves out is told."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from conftest import SAMPLE

from dmoe_export.errors import RequestError
from dmoe_export.text.codec import TextCodec
from dmoe_export.text.messages import plain_messages
from dmoe_export.text.prompts import batch_of, encode


@pytest.fixture(scope="module")
def codec():
    return TextCodec(SAMPLE / "tokenizer.json", (SAMPLE / "chat_template.jinja").read_text())


@pytest.mark.parametrize("chat", ["no", "", 0, 1, None, [], np.bool_(True)])
def test_chat_is_true_or_false(codec, chat):
    with pytest.raises(RequestError, match="it must be True or False"):
        encode("what", chat, codec, Path("b"))


NO_IDS = {
    "true": [True], "false": [False, 1], "nothing and text": [5, None, "3"], "nothing": [5, None], "a float": [1.0],
    "text": [5, "5"], "bytes": [b"5"], "a list": [5, [6]], "400 digits": [10**400], "5000 digits": [-10**5000],
    "64 bits": [2**63], "floats": np.array([1.5, 2]), "truths": np.array([True]), "a truth": [np.bool_(True)],
    "nan": [float("nan")], "a message": [5, {"role": "user", "content": "x"}]}


@pytest.mark.parametrize("ids", NO_IDS.values(), ids=NO_IDS)
def test_ids_are_integers(codec, ids):
    with pytest.raises(RequestError, match="neither text, nor token ids, nor chat messages") as caught:
        encode(ids, True, codec, Path("b"))
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("ids", [[5, 6], (5, 6), np.array([5, 6]), np.array([5, 6], np.uint8), range(5, 7)])
def test_ids_of_any_kind(codec, ids):
    assert encode(ids, True, codec, Path("b")) == [5, 6]
    assert len(batch_of(ids)) == 1


@pytest.mark.parametrize("prompts", [5, None, {"role": "user"}, b"what", np.array(5), object(), iter(["what"]),
                                     {"a": "x" * 10**6}, [], (), np.array([])], ids=lambda one: repr(one)[:20])
def test_what_is_no_list_of_prompts(prompts):
    with pytest.raises(RequestError) as caught:
        batch_of(prompts)
    assert len(str(caught.value)) < 400


class Endless:
    """A list of as many prompts as it likes, none of which it holds."""

    def __len__(self):
        return 2**62

    def __getitem__(self, i):
        return "what"


def test_a_length_costs_nothing_to_say(codec):
    for ids in (range(10**12), range(2**24 + 1)):
        with pytest.raises(RequestError, match=f"^Prompt of {len(ids)} token ids is longer than"):
            encode(ids, True, codec, Path("b"))
    with pytest.raises(RequestError, match=f"^{2**62} prompts are more than"):
        batch_of(Endless())


def nested(depth):
    inner = []
    for _ in range(depth):
        inner = [inner]
    return inner


@pytest.mark.parametrize("value", [nested(51), nested(100_000), {"a": nested(100_000)}])
def test_messages_in_messages_without_end(value):
    with pytest.raises(RequestError, match="levels deep"):
        plain_messages([{"role": "user", "content": "x", "extra": value}])


def test_a_message_in_itself():
    message = {"role": "user", "content": "x"}
    message["extra"] = message
    with pytest.raises(RequestError, match="levels deep"):
        plain_messages([message])


@pytest.mark.parametrize("message", [{"role": "user", "n": 10**5000}, {"role": 10**5000, "content": "x"}, None, 5, [],
                                     {"role": "user", "content": "x", "n": b""}])
def test_messages_that_cannot_even_be_shown(message):
    with pytest.raises(RequestError, match=r"needs the texts|has a value of type bytes"):
        plain_messages([message])


def warned(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_a_role_that_the_template_leaves_out_is_told_once(caplog):
    only_users = ("{% for m in messages %}{% if m.role == 'user' %}<role>{{ m.content | upper }}</role>{% endif %}"
                  "{% endfor %}")
    codec = TextCodec(SAMPLE / "tokenizer.json", only_users)
    codec.encode_chat([{"role": "user", "content": "what is"}, {"role": "system", "content": " "}])
    assert not warned(caplog)
    for _ in range(2):
        codec.encode_chat([{"role": "system", "content": "user"}, {"role": "user", "content": "what is"}])
    assert warned(caplog) == ["The chat template leaves out what messages of role 'system' say."]


@pytest.mark.parametrize("template", [
    "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}", "{{ messages | tojson }}",
    "{% for m in messages %}{{ m.content[:2] }}{% endfor %}", "{% for m in messages %}{{ m.content[-2:] }}{% endfor %}",
    "{% if messages[0].content != 'be nice' %}{{ raise_exception('no') }}{% endif %}{{ messages[1].content }}",
    "{{ messages | map(attribute='content') | join }}"])
def test_what_is_cut_or_asked_for_is_not_left_out(caplog, template):
    codec = TextCodec(SAMPLE / "tokenizer.json", template)
    codec.encode_chat([{"role": "system", "content": "be nice"}, {"role": "user", "content": "a</think>what is"}])
    assert not warned(caplog)


def test_roles_without_end_are_not_looked_at(caplog):
    codec = TextCodec(SAMPLE / "tokenizer.json", "what")
    codec.encode_chat([{"role": f"role {i}", "content": "x"} for i in range(1000)])
    assert len(warned(caplog)) == 8


def test_a_long_message_is_a_sentence_or_an_answer(codec):
    chat = [{"role": "user", "content": "is " * 100_000}]
    assert len(codec.encode_chat(chat)) >= 100_000
    with pytest.raises(RequestError, match=r"Prompt of|value of"):
        codec.encode_chat([{"role": "user", "content": "is " * 4_000_000}])


def test_numbers_of_a_message_that_python_does_not_write(codec):
    codec = TextCodec(SAMPLE / "tokenizer.json", "{{ messages | tojson }}")
    with pytest.raises(RequestError, match="4300 digits"):
        codec.encode_chat([{"role": "user", "content": "x", "n": json.loads("1" + "0" * 4000) ** 2}])
