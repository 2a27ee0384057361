"""The bytes that each token adds to a text, where that does not depend on the tokens around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import RequestError


@dataclass(frozen=True)
class Vocabulary:
    """What tokens spell; `b""` is for those that may not stand in a match: special ones, and ids without a token."""

    pieces: Sequence[bytes]  # [V]
    spaced: bool = False  # one leading space of the whole text is taken away

    def without(self, barred: Sequence[int]) -> Vocabulary:
        """Without these tokens, which mean something else; itself where they spell nothing."""
        gone = [token for token in barred if 0 <= token < len(self.pieces) and self.pieces[token]]
        if not gone:
            return self
        pieces = list(self.pieces)
        for token in gone:
            pieces[token] = b""
        return Vocabulary(pieces, self.spaced)


class Trie:
    """All tokens of a vocabulary by their beginnings, level by level: node i of a level is its parent and one byte."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        lengths = np.array([len(piece) for piece in vocabulary.pieces], np.int64)
        data = np.frombuffer(b"".join(vocabulary.pieces), np.uint8)
        first = lengths.cumsum() - lengths
        self.tokens = len(lengths)
        self.levels: list[tuple[NDArray[np.int32], NDArray[np.uint8]]] = []  # parents in the level before, bytes
        self.ends: list[tuple[NDArray[np.int32], NDArray[np.int32]]] = []  # tokens that end in the level, their nodes
        there, nodes = np.flatnonzero(lengths), np.zeros(int((lengths > 0).sum()), np.int64)
        while len(there):
            depth = len(self.levels)
            keys, nodes = np.unique(nodes * 256 + data[first[there] + depth], return_inverse=True)
            self.levels.append(((keys >> 8).astype(np.int32), (keys & 255).astype(np.uint8)))
            over = lengths[there] == depth + 1
            self.ends.append((there[over].astype(np.int32), nodes[over].astype(np.int32)))
            there, nodes = there[~over], nodes[~over]

    @property
    def nodes(self) -> int:
        """How many there are."""
        return sum(len(parents) for parents, _ in self.levels)


class Codec(Protocol):
    """What a vocabulary is made of."""

    @property
    def loses_blank(self) -> bool | None:
        """Whether a text loses one blank that it begins with; None where it may lose more, or else."""
        ...

    def added_bytes(self, id_: int) -> bytes | None:
        """What a token adds to a text; none of one that decoding leaves out, None where that is not of it alone."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Text of token ids."""
        ...


def vocabulary_of(codec: Codec, size: int) -> Vocabulary:
    """The vocabulary of a tokenizer for a model of so many tokens; all of them are held against what it decodes.

    Raises RequestError for a decoder in which a token's text depends on its neighbours, and one not known here.
    """
    pieces = [codec.added_bytes(id_) for id_ in range(size)]
    spelled = [piece for piece in pieces if piece is not None]
    if len(spelled) < size or codec.loses_blank is None:
        raise RequestError("Answers cannot be held to a regular expression or a schema, as the bundle's tokenizer has "
                           "a decoder by which a token's text may depend on those beside it; leave it out.")
    vocabulary = Vocabulary(spelled, codec.loses_blank)
    whole = [i for i, piece in enumerate(spelled) if piece and _is_text(piece)]
    order = np.random.default_rng(0).permutation(np.array(whole, np.int64)).tolist()
    wanted = b"".join(spelled[i] for i in order).decode("utf-8")
    if codec.decode(order) != (wanted[1:] if vocabulary.spaced and wanted.startswith(" ") else wanted):
        raise RequestError("Answers cannot be held to a regular expression or a schema, as the bundle's tokenizer "
                           "decodes tokens to other text than they spell; leave it out.")
    return vocabulary


def _is_text(piece: bytes) -> bool:
    try:
        piece.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
