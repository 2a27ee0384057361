"""The text of each place of a block that is not finished: for eyes alone, and never an answer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from .codec import TextCodec

_PAIRS = 1 << 14  # pairs of tokens whose text an answer remembers


class Pieces:
    """Texts of one answer's places, block after block.

    A token's text may depend on the token before it (a blank, the second half of a letter), so pairs are decoded; what
    a place says may change with its neighbour, and pieces need not add up to the committed text.
    """

    def __init__(self, codec: TextCodec | None) -> None:
        """Without a tokenizer, pieces are token ids."""
        self._codec = codec
        self._piece = lru_cache(_PAIRS)(self._decoded)
        self._block, self._before, self._last = -1, -1, -1

    def of(self, block: int, ids: Sequence[int]) -> list[str]:
        """`block`: its number, so that its first place is read after the last one's end; `ids`: −1 has no text."""
        if block != self._block:
            self._block, self._before = block, self._last
        self._last = ids[-1] if ids else -1
        return [self._piece(before, id_) for before, id_ in zip([self._before, *ids], ids, strict=False)]

    def _decoded(self, before: int, id_: int) -> str:
        if id_ < 0:
            return ""
        if self._codec is None:
            return f"{id_},"
        first = self._codec.decode([before]) if before >= 0 else ""
        both = self._codec.decode([before, id_]) if first else ""
        return both[len(first):] if first and both.startswith(first) else self._codec.decode([id_])
