"""The bytes that each token adds to a text, where that does not depend on the tokens around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

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
    def decoder(self) -> dict[str, Any] | None:
        """How tokens become text: that part of tokenizer.json."""
        ...

    def token(self, id_: int) -> str | None:
        """A token's name; None for one that decoding leaves out."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Text of token ids."""
        ...


def vocabulary_of(codec: Codec, size: int) -> Vocabulary:
    """The vocabulary of a tokenizer for a model of so many tokens; all of them are held against what it decodes.

    Raises RequestError for a decoder in which a token's text depends on its neighbours, and one not known here.
    """
    spell, spaced = _speller(codec.decoder)
    names = map(codec.token, range(size))
    vocabulary = Vocabulary([b"" if name is None else spell(name) for name in names], spaced)
    whole = [i for i, piece in enumerate(vocabulary.pieces) if piece and _is_text(piece)]
    order = np.random.default_rng(0).permutation(np.array(whole, np.int64)).tolist()
    wanted = b"".join(vocabulary.pieces[i] for i in order).decode("utf-8")
    if codec.decode(order) != (wanted[1:] if spaced and wanted.startswith(" ") else wanted):
        raise RequestError("Answers cannot be held to a regular expression or a schema, as the bundle's tokenizer "
                           "decodes tokens to other text than they spell; leave it out.")
    return vocabulary


def _speller(decoder: dict[str, Any] | None) -> tuple[Callable[[str], bytes], bool]:
    """What a token's name spells, and whether the text loses a leading space."""
    parts = _parts(decoder)
    if [part.get("type") for part in parts] == ["ByteLevel"]:
        return _byte_level, False
    replaced: list[tuple[str, str]] = []
    fallback = fused = spaced = False
    for part in parts:
        kind, pattern = part.get("type"), part.get("pattern")
        text = pattern.get("String") if isinstance(pattern, dict) else None
        if kind == "Replace" and text and not (fused or fallback):
            replaced.append((text, str(part.get("content"))))
        elif kind == "ByteFallback" and not (fused or fallback):
            fallback = True
        elif kind == "Fuse" and not fused:
            fused = True
        elif kind == "Strip" and fused and not spaced and (
                (part.get("content"), part.get("start"), part.get("stop")) == (" ", 1, 0)):
            spaced = True
        else:
            raise RequestError("Answers cannot be held to a regular expression or a schema, as the bundle's tokenizer "
                               f"has a decoder {str(kind)[:40]} there, by which a token's text may depend on those "
                               "beside it; leave it out.")
    if not fused:
        raise RequestError("Answers cannot be held to a regular expression or a schema, as the bundle's tokenizer has "
                           "no decoder that joins tokens and puts spaces between them; leave it out.")

    def spell(name: str) -> bytes:
        for text, content in replaced:
            name = name.replace(text, content)
        if fallback and len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            try:
                return bytes([int(name[3:5], 16)])
            except ValueError:
                pass
        return name.encode("utf-8", errors="replace")
    return spell, spaced


def _parts(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder.get("type") == "Sequence":
        return [part for inner in decoder.get("decoders", []) for part in _parts(inner)]
    return [decoder]


def _letters() -> dict[str, int]:
    """The letters by which byte-level tokenizers write bytes (GPT-2)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


_LETTERS = _letters()


def _byte_level(name: str) -> bytes:
    try:
        return bytes([_LETTERS[letter] for letter in name])
    except KeyError:  # an added token, which stands for itself
        return name.encode("utf-8", errors="replace")


def _is_text(piece: bytes) -> bool:
    try:
        piece.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
