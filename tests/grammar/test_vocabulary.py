"""What tokens spell is what the tokenizer decodes, whatever stands beside them."""

from __future__ import annotations

import numpy as np
import pytest
from text_codecs import KINDS, codec
from tokenizers import decoders

from dmoe_export.errors import RequestError
from dmoe_export.grammar.vocabulary import Trie, Vocabulary, vocabulary_of


@pytest.mark.parametrize("kind", KINDS)
def test_random_tokens_decode_to_what_they_spell(kind, tmp_path):
    """Of texts that are UTF-8, as all that can match are."""
    text = codec(KINDS[kind](), tmp_path)
    size = text._tokenizer.get_vocab_size()
    vocabulary = vocabulary_of(text, size + 3)
    assert vocabulary.pieces[size:] == [b""] * 3
    assert all(vocabulary.pieces[i] == b"" for i in text._special)
    spelling = np.flatnonzero([bool(piece) for piece in vocabulary.pieces])
    rng, compared = np.random.default_rng(0), 0
    letters = [int(i) for i in spelling if len(vocabulary.pieces[i]) == 1 and vocabulary.pieces[i] >= b"\x80"]
    for number in range(400):
        ids = rng.choice(spelling, rng.integers(1, 9)).tolist()
        if letters and number % 2:  # a letter of several bytes, byte by byte
            data = {vocabulary.pieces[i]: i for i in letters}
            ids[1:1] = [data[bytes([byte])] for byte in "é€"[number % 4 // 2].encode()]
        try:
            wanted = b"".join(vocabulary.pieces[i] for i in ids).decode()
        except UnicodeDecodeError:
            continue
        compared += 1
        assert text.decode(ids) == wanted[vocabulary.spaced and wanted.startswith(" "):]
    assert compared > 50


@pytest.mark.parametrize("decoder", [
    None, decoders.WordPiece(), decoders.Metaspace(), decoders.CTC(),
    decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "x")]),
    decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 1)]),
    decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 2, 0)]),
    decoders.Sequence([decoders.Fuse(), decoders.Strip("_", 1, 0)]),
    decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 0), decoders.Strip(" ", 1, 0)]),
    decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])])
def test_decoders_in_which_tokens_depend_on_their_neighbours_are_refused(decoder, tmp_path):
    tokenizer = KINDS["word-level"]()
    tokenizer.decoder = decoder
    text = codec(tokenizer, tmp_path)
    with pytest.raises(RequestError, match=r"^Answers cannot .* a decoder by which a token's text may depend on"):
        vocabulary_of(text, 40)


def test_a_tokenizer_that_decodes_to_other_text_than_its_tokens_spell_is_refused(tmp_path):
    class Odd:
        text = codec(KINDS["byte-level"](), tmp_path)
        loses_blank, added_bytes = text.loses_blank, text.added_bytes

        def decode(self, ids):
            return self.text.decode(ids).replace("role", "rule")

    with pytest.raises(RequestError, match="decodes tokens to other text than they spell"):
        vocabulary_of(Odd(), 100 + len(Odd.text._special) + 180)


def test_a_trie_holds_every_token_by_its_bytes():
    pieces = [b"ab", b"", b"a", b"abc", b"b", b"ab", b"\xff\x00"]
    trie, spelled = Trie(Vocabulary(pieces)), {}
    nodes = [[b""]]
    for (parents, data), (tokens, last) in zip(trie.levels, trie.ends, strict=True):
        nodes.append([nodes[-1][parent] + bytes([byte]) for parent, byte in zip(parents, data, strict=True)])
        spelled |= {int(token): nodes[-1][node] for token, node in zip(tokens, last, strict=True)}
    assert spelled == {i: piece for i, piece in enumerate(pieces) if piece}
    assert trie.nodes == 6 == sum(len(set(level)) for level in nodes[1:])
