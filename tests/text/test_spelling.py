"""What a token adds to a text: bytes of tokens, one after the other, are the text that decoding gives."""

from __future__ import annotations

import random

import pytest
from text_codecs import KINDS, WORDS, byte_level, codec, metaspace, word_level
from tokenizers import decoders, pre_tokenizers

TEXTS = ["hello, is it me?", " two  words", "héllo ✓ 𝄞", "<role>user", "what is\ttwo\r\n"]


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_tokens_are_the_text(tmp_path, kind):
    mine, chance = codec(KINDS[kind](), tmp_path), random.Random(3)
    texts = [*TEXTS, *("".join(chance.choices([*WORDS, " ", "é", "!", "ß"], k=8)) for _ in range(20))]
    for text in texts:
        ids = mine.encode_plain(text)
        said = [mine.spelling(token) for token in ids]
        joined = b"".join(utf8 for _, utf8 in said)
        whole = mine.decode(ids)  # a blank that a decoder takes off its beginning is left in the token
        assert joined.decode("utf-8", "replace") in (whole, f" {whole}")
        assert all(token == utf8.decode("utf-8", "replace") for token, utf8 in said if utf8)


def test_parts_of_a_character_special_tokens_and_unknown_ones(tmp_path):
    mine = codec(byte_level(), tmp_path)
    assert [mine.spelling(token) for token in mine.encode_plain("✓")] == [
        ("\ufffd", b"\xe2"), ("\ufffd", b"\x9c"), ("\ufffd", b"\x93")]
    role = mine.spelling(next(i for i in range(300) if mine._tokenizer.id_to_token(i) == "<role>"))
    assert role == ("<role>", b"") and mine.decode([mine._tokenizer.token_to_id("<role>")]) == ""
    not_special = mine._tokenizer.token_to_id("</role>")
    assert mine.spelling(not_special) == ("</role>", b"</role>")
    assert mine.spelling(100_000) == ("", b"")
    other = codec(metaspace(), tmp_path)
    assert other.spelling(other._tokenizer.token_to_id("<0xE2>")) == ("\ufffd", b"\xe2")
    assert other.spelling(other._tokenizer.token_to_id("▁two")) == (" two", b" two")


@pytest.mark.parametrize("decoder", [decoders.WordPiece(), decoders.BPEDecoder(), None, decoders.Sequence([
    decoders.Fuse(), decoders.Replace("a", "b")]), decoders.CTC()])
def test_where_a_token_depends_on_its_neighbours_its_bytes_are_not_known(tmp_path, decoder):
    tokenizer = word_level()
    if decoder is None:
        mine = codec(tokenizer, tmp_path, decoder=None)
    else:
        tokenizer.decoder = decoder
        mine = codec(tokenizer, tmp_path)
    token = tokenizer.token_to_id("hello")
    assert mine.spelling(token) == (mine.decode([token]), None)


def test_every_byte_of_byte_level_tokens(tmp_path):
    mine = codec(byte_level(), tmp_path)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(mine.spelling(i)[1] for i in range(len(letters))) == [bytes([byte]) for byte in range(256)]
