"""tokenizer.json that makes its library panic, abort, or search for ever: one sentence, and the process lives."""

from __future__ import annotations

import base64
import copy
import json
import os
import threading
import time

import pytest
from conftest import SAMPLE

from dmoe_export.checkpoint.text import read_text_side
from dmoe_export.errors import BundleError, CheckpointError, DmoeError, RequestError
from dmoe_export.guards import tokenizer as tokenizer_guard
from dmoe_export.guards.tokenizer import GuardedTokenizer, no_panics, within
from dmoe_export.text.codec import TextCodec

BASE = json.loads((SAMPLE / "tokenizer.json").read_text(encoding="utf-8"))
BPE = {"type": "BPE", "dropout": None, "unk_token": None, "end_of_word_suffix": None, "fuse_unk": False,
       "byte_fallback": False, "ignore_merges": False, "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
SLOW = "(a+)+b"  # seconds for a few words that nearly match


def regex(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def replace(old, new, kind="String"):
    return {"type": "Replace", "pattern": {kind: old}, "content": new}


def added(**fields):
    token = {"id": 150, "content": "<x>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": True,
             "special": True}
    return {"added_tokens": [*BASE["added_tokens"], token | fields]}


def vocab(**pieces):
    return {"model": copy.deepcopy(BASE["model"]) | {"vocab": BASE["model"]["vocab"] | pieces}}


def template(steps, special):
    return {"post_processor": {"type": "TemplateProcessing", "single": steps, "pair": steps, "special_tokens": special}}


TEXT, END = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<e>", "type_id": 0}}
NOT_OPENED = {
    "a token of an id that lists 8 GB": (added(id=2**31), "outside 0 … 16777215"),
    "a piece of such an id": (vocab(zz=2**31), "id 2147483648, which is outside"),
    "an id of no type": (added(id=10**12), "outside"), "a negative id": (vocab(zz=-1), "id -1, which is outside"),
    "an id of 400 digits": (added(id=10**400), "2\\^64 or more"),
    "a token of a million characters": (added(content="x" * 10**6), "1000000 characters"),
    "replacements that multiply": ({"normalizer": {"type": "Sequence", "normalizers": [replace("a", "a" * 10)] * 12}},
                                   "times as long"),
    "a long prefix": ({"normalizer": {"type": "Prepend", "prepend": "x" * 10**7}}, "times as long"),
    "growth in the decoder": ({"decoder": {"type": "Sequence", "decoders": [replace("a", "a" * 10)] * 12}}, "times as"),
    "a thousand splitters": ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [regex("a")] * 1000}},
                             "normalizers, splitters"),
    "a table shorter than its trie": ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(
        b"\xff\xff\xff\xff").decode()}}, "charsmap is damaged"),
    "an empty table": ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}}, "charsmap is damaged"),
    "millions of tokens around a text": (template([END] * 1000 + [TEXT], {"<e>": {
        "id": "<e>", "ids": [1] * 10_000, "tokens": ["<e>"] * 10_000}}), "post_processor adds"),
    "a prefix of pieces that panics": ({"model": BPE | {"continuing_subword_prefix": "##"}, "added_tokens": []},
                                       "slice index|out of range"),
    "merges at random": ({"model": BPE | {"dropout": 0.1}, "added_tokens": []}, "drops pieces at random .dropout 0.1"),
    "a pattern that is none": ({"pre_tokenizer": regex("(")}, "Oniguruma"),
    "lists in lists": (None, "recursion")}


def tokenizer(tmp_path, fields):
    file = tmp_path / "tokenizer.json"
    file.write_text("[" * 50_000 + "]" * 50_000 if fields is None else json.dumps(BASE | fields), encoding="utf-8")
    return file


@pytest.mark.parametrize("name", NOT_OPENED)
def test_what_is_not_opened(tmp_path, name):
    fields, words = NOT_OPENED[name]
    file = tokenizer(tmp_path, fields)
    with pytest.raises(BundleError, match=words) as caught:
        TextCodec(file, None)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    with pytest.raises(CheckpointError, match=f"cannot be read as (a tokenizer|JSON): .*({words})"):
        read_text_side(tmp_path, None)


NOT_ENCODED = {
    "a pattern that explodes": {"pre_tokenizer": regex("(a+)+$")},
    "a token that is not there": template([END, TEXT], {}),
    "pieces of no length": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "a table of noise": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(
        b"\x10\0\0\0" + b"\xff" * 16 + b"abc").decode()}},
    "an unknown word without a name": {"model": BASE["model"] | {"unk_token": "nosuch"}}}


@pytest.mark.parametrize("name", NOT_ENCODED)
def test_what_panics_at_a_prompt(tmp_path, name):
    codec = TextCodec(tokenizer(tmp_path, NOT_ENCODED[name]), "{{ messages[0].content }}")
    ways = [codec.encode_plain, codec.encode_literal,
            lambda text: codec.encode_chat([{"role": "user", "content": text}])]
    for encode in ways[:1] if "post_processor" in NOT_ENCODED[name] else ways:  # chat goes without one
        with pytest.raises(RequestError, match=r"The tokenizer cannot encode a prompt of 31 characters: .*"):
            encode("a" * 30 + "☃")


def test_what_panics_at_an_answer(tmp_path):
    strip = {"type": "Strip", "content": "h", "start": 5, "stop": 5}
    decoder = {"type": "Sequence", "decoders": [{"type": "Fuse"}, strip]}
    codec = TextCodec(tokenizer(tmp_path, {"decoder": decoder}), None)
    with pytest.raises(RequestError, match="cannot decode 0 token ids: index out of bounds"):
        codec.decode([])


def test_searches_end(tmp_path, monkeypatch):
    """Others go on meanwhile: the library lets them."""
    codec = TextCodec(tokenizer(tmp_path, {"pre_tokenizer": regex(SLOW), "normalizer": None}), None)
    monkeypatch.setattr(tokenizer_guard, "SECONDS", 0.2)
    ticks, stop = [], threading.Event()
    other = threading.Thread(target=lambda: [ticks.append(1) for _ in iter(lambda: stop.wait(0.01), True)])
    other.start()
    start = time.perf_counter()
    with pytest.raises(RequestError, match=r"takes more than 0.2 s"):
        codec.encode_plain(("a" * 19 + "c ") * 100)
    took = time.perf_counter() - start
    stop.set()
    other.join()
    assert took < 10 and len(ticks) > 5
    assert codec.encode_plain("what")  # the next one gets a thread of its own


def test_contents_of_tokens_are_normalised_within_a_limit(tmp_path, monkeypatch):
    """Adding a token holds up all threads, so the same is tried where it does not."""
    monkeypatch.setattr(tokenizer_guard, "SECONDS", 0.2)
    fields = added(content=("a" * 19 + "c ") * 40) | {"normalizer": replace(SLOW, "x", "Regex")}
    with pytest.raises(BundleError, match=r"cannot be read as a tokenizer: it takes more than"):
        TextCodec(tokenizer(tmp_path, fields), None)
    tokenizer(tmp_path, {"normalizer": replace(SLOW, "x", "Regex")})
    token = {"content": ("a" * 19 + "c ") * 40, "normalized": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"150": token}}))
    with pytest.raises(CheckpointError, match=r"it takes more than"):
        read_text_side(tmp_path, None)


def test_a_prompt_has_a_length(tmp_path, monkeypatch):
    codec = TextCodec(SAMPLE / "tokenizer.json", None)
    assert codec._guarded.most_characters < tokenizer_guard.MOST_CHARACTERS  # its normalizer adds spaces
    with pytest.raises(RequestError, match="Prompt of 10000000 characters is longer than"):
        codec.encode_plain("a" * 10**7)


def test_a_name_that_stands_twice_is_read_as_it_was_checked(tmp_path):
    text = json.dumps(BASE)[:-1] + ', "normalizer": null}'
    (tmp_path / "tokenizer.json").write_text(text)
    codec = TextCodec(tmp_path / "tokenizer.json", None)
    assert codec._tokenizer.normalizer is None


def test_only_panics_of_the_library_become_sentences():
    for error in (KeyboardInterrupt, SystemExit, GeneratorExit):
        with pytest.raises(error), no_panics(RequestError):
            raise error
    with pytest.raises(DmoeError, match=r"^ours$"), no_panics(BundleError):
        raise RequestError("ours")
    with pytest.raises(BundleError, match=r"^two lines$"), no_panics(BundleError):
        raise OSError("two\nlines.")


def test_a_call_costs_little_and_threads_are_used_again():
    before = threading.active_count()
    start = time.perf_counter()
    for i in range(1000):
        assert within(lambda i=i: i + 1) == i + 1
    assert time.perf_counter() - start < 2  # 14 µs each on a quiet machine
    assert threading.active_count() <= before + 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="of systems that fork")
def test_a_process_that_forks_encodes_in_both(capfd):
    tokenizer = GuardedTokenizer(BASE)
    ids = tokenizer.encode("what is 2").ids
    child = os.fork()
    if child == 0:
        os._exit(0 if tokenizer.encode("what is 2").ids == ids else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
