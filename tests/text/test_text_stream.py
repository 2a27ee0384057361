"""Pieces of a streamed answer add up to its text, and what was shown stays."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from text_codecs import KINDS, byte_level, codec, metaspace
from tokenizers import Regex, decoders

from dmoe_export.text.behind import Behind
from dmoe_export.text.codec import TextStream
from dmoe_export.text.stream import Tail

DECODERS = {
    "own": None, "fuse": decoders.Fuse(), "word piece": decoders.WordPiece("##", cleanup=True),
    "bpe": decoders.BPEDecoder("e"), "metaspace": decoders.Metaspace(), "ctc": decoders.CTC("<unk>", " ", cleanup=True),
    "strip": decoders.Sequence([decoders.Fuse(), decoders.Strip("e", 1, 0)]),
    "replace, fused": decoders.Sequence([decoders.Fuse(), decoders.Replace("he", "E"), decoders.Replace(" E", "e")]),
    "replace by pattern": decoders.Sequence([decoders.Fuse(), decoders.Replace(Regex("h.*o"), "x")]),
    "bytes, not fused": decoders.Sequence([decoders.ByteFallback(), decoders.Replace("▁", " ")]),
}


@pytest.fixture(scope="module")
def codecs(tmp_path_factory):
    made = {}

    def get(kind, decoder):
        if (kind, decoder) not in made:
            tokenizer = KINDS[kind]()
            if DECODERS[decoder] is not None:
                tokenizer.decoder = DECODERS[decoder]
            made[kind, decoder] = codec(tokenizer, tmp_path_factory.mktemp("c"))
        return made[kind, decoder]
    return get


@pytest.mark.parametrize("kind", ["word-level", "byte-level", "metaspace first"])
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(decoder=st.sampled_from(list(DECODERS)), text=st.text("he o.é€😀\ufffd▁'", max_size=8), data=st.data())
def test_pieces_add_up(codecs, kind, decoder, text, data):
    subject = codecs(kind, decoder)
    size = subject._tokenizer.get_vocab_size()
    ids = subject.encode_literal(text) + data.draw(st.lists(st.integers(0, size - 1), max_size=4))
    ids = data.draw(st.permutations(ids)) if data.draw(st.booleans()) else ids
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=6)))
    stream, shown = TextStream(subject), ""
    for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        shown += stream.push(ids[start:end], end == len(ids) and start == ([0, *cuts][-1]))
    assert shown + stream.push([], True) == subject.decode(ids)


@pytest.mark.parametrize("kind", ["word-level", "byte-level", "metaspace first"])
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(decoder=st.sampled_from(list(DECODERS)), text=st.text("he o.é€😀\ufffd▁'", max_size=8), data=st.data())
def test_pieces_behind_other_tokens_add_up(codecs, kind, decoder, text, data):
    subject = codecs(kind, decoder)
    ids = subject.encode_literal(text)
    ids = data.draw(st.permutations(ids)) if data.draw(st.booleans()) else ids
    start, *cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), min_size=1, max_size=6)))
    behind = Behind(subject, ids[:start])
    stream, shown = TextStream(behind), ""
    for first, end in zip([start, *cuts], cuts, strict=False):
        shown += stream.push(ids[first:end], False)
    assert shown + stream.push(ids[([start, *cuts])[-1]:], True) == behind.decode(ids[start:])
    before = subject.decode(ids[:start])
    if subject.decode(ids).startswith(before):
        assert before + behind.decode(ids[start:]) == subject.decode(ids)


def test_what_follows_a_token_keeps_its_blank(tmp_path):
    subject = codec(metaspace(), tmp_path)
    first, second = subject.encode_literal("hello"), subject.encode_literal("hello two")[1:]
    assert Behind(subject, first).decode(second) == " two" and subject.decode(second) == "two"


def test_a_byte_run_waits_as_a_whole(tmp_path):
    """Two bytes of é and a stray one are three unknown letters, so é must not have been shown."""
    subject = codec(metaspace(), tmp_path)
    byte = [subject._tokenizer.token_to_id(f"<0x{b:02X}>") for b in (0xC3, 0xA9, 0xFF)]
    hello = subject.encode_literal("hello")
    stream = TextStream(subject)
    assert [stream.push(ids, False) for ids in (hello, byte[:1], byte[1:2], byte[2:])] == ["hello", "", "", ""]
    assert stream.push(hello, False) == "\ufffd\ufffd\ufffd hello"


def test_a_real_replacement_character_is_shown(tmp_path):
    subject = codec(byte_level(), tmp_path)
    stream = TextStream(subject)
    assert stream.push(subject.encode_literal("a\ufffd"), False) == "a"
    assert stream.push(subject.encode_literal("b"), True) == "\ufffdb"


def test_what_is_not_known_to_be_steady_comes_at_the_end():
    assert Tail(None).whole is False and Tail({"type": "Unheard"}).whole
    replace = {"type": "Replace", "pattern": {"Regex": "a"}}
    assert Tail({"type": "Sequence", "decoders": [{"type": "Fuse"}, replace]}).whole
    assert not Tail({"type": "Sequence", "decoders": [replace, {"type": "Fuse"}]}).whole
