"""The key/value cache in host memory: arrays of bucketed length, unused places at position −1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .backend import Bools, ForwardInputs, ForwardOutputs

BUCKET = 128  # lengths come in multiples of this, so that shapes repeat and copies are rare


def bucketed(length: int) -> int:
    """The length of the arrays that hold so many tokens; 1 for none, as no tensor is ever empty."""
    return max(1, -(-length // BUCKET) * BUCKET)


class HostCache:
    """Keys and values [B, Hkv, S, D] of each layer, with Hkv and D of its own, and positions [B, S] of B rows.

    Rows that nobody has are all zero: a place that is not seen has weight 0, which must not meet another row's NaN.
    """

    def __init__(self, rows: int, heads: Sequence[tuple[int, int]], dtype: np.dtype[Any]) -> None:
        """`heads`: (Hkv, D) layer by layer (`ModelDescription.cached_heads`)."""
        self.keys = [np.zeros((rows, count, 1, width), dtype) for count, width in heads]
        self.values = [np.zeros_like(x) for x in self.keys]
        self.positions = np.full((rows, 1), -1, np.int64)
        self.lengths = np.zeros(rows, np.int64)
        self._written = np.zeros(rows, np.int64)  # places that may hold more than zeros: `clear` leaves them

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token in all layers."""
        return self._token_values * self.keys[0].itemsize

    def part(self, rows: Sequence[int]) -> HostCache:
        """These rows in this order, to be read by a forward: a view where they lie side by side, else a copy."""
        first = rows[0]
        beside = list(rows) == list(range(first, first + len(rows)))
        place: slice | list[int] = slice(first, first + len(rows)) if beside else list(rows)
        part = object.__new__(HostCache)
        part.keys, part.values = [x[place] for x in self.keys], [x[place] for x in self.values]
        part.positions, part.lengths = self.positions[place], self.lengths[place]
        return part

    def commit(self, inputs: ForwardInputs, outputs: ForwardOutputs, take: Bools,
               rows: Sequence[int] | None = None) -> None:
        """Append the tokens marked in take [B, T] to the rows of the forward, by default all."""
        new_keys, new_values = outputs.keys_values
        counts = take.sum(axis=1)
        places = np.arange(len(take)) if rows is None else np.asarray(rows)
        self._reserve(int((self.lengths[places] + counts).max()))
        for i in np.flatnonzero(counts):
            row = int(places[i])
            where = slice(int(self.lengths[row]), int(self.lengths[row] + counts[i]))
            for cached, new in zip((*self.keys, *self.values), (*new_keys, *new_values), strict=True):
                cached[row, :, where] = new[i][:, take[i]]
            self.positions[row, where] = inputs.position_ids[i, take[i]]
            self._reached(row, where.stop)

    def clear(self, rows: Sequence[int]) -> None:
        """Forget everything these rows have cached; the arrays keep their length, so that shapes repeat."""
        self.positions[rows], self.lengths[rows] = -1, 0

    def leave(self, row: int, last: int) -> None:
        """Free a row: the last one in use takes its place; arrays twice as long as the longest row needs shrink."""
        both, mine = int(self._written[[row, last]].max()), int(self._written[last])
        for x in (*self.keys, *self.values):
            if row != last:
                x[row, :, :both] = x[last, :, :both]
            x[last, :, :mine] = 0
        for x in (self.positions, self.lengths, self._written):
            x[row] = x[last]
        self.clear([last])
        self._written[last] = 0
        need = bucketed(int(self.lengths.max()))
        if 2 * need <= self.positions.shape[1]:
            self._resize(need)

    def read(self, row: int, start: int, stop: int) -> NDArray[Any]:
        """Keys, then values of a row's tokens at positions start … stop − 1, all layers: [Hkv, tokens, D] one after
        the other in one array, so that a block is no larger than `token_bytes` says."""
        assert (self.positions[row, start:stop] == np.arange(start, stop)).all(), "a row's places are its positions"
        return np.concatenate([x[row, :, start:stop].ravel() for x in (*self.keys, *self.values)])

    def write(self, row: int, blocks: Sequence[NDArray[Any]]) -> None:
        """Append blocks that `read` gave, whose positions follow what the row has cached."""
        start = int(self.lengths[row])
        stop = start + sum(block.size // self._token_values for block in blocks)
        self._reserve(stop)
        place = start
        for block in blocks:
            at, tokens = 0, block.size // self._token_values
            for x in (*self.keys, *self.values):
                _, heads, _, width = x.shape
                size = heads * tokens * width
                x[row, :, place:place + tokens] = block[at:at + size].reshape(heads, tokens, width)
                at += size
            place += tokens
        self.positions[row, start:stop] = np.arange(start, stop)
        self._reached(row, stop)

    @property
    def _token_values(self) -> int:
        return 2 * sum(x.shape[1] * x.shape[3] for x in self.keys)

    def _reached(self, row: int, length: int) -> None:
        self.lengths[row], self._written[row] = length, max(length, self._written[row])

    def _reserve(self, length: int) -> None:
        if length > self.positions.shape[1]:
            self._resize(bucketed(length))

    def _resize(self, length: int) -> None:
        """Arrays of another length; only what rows hold is copied, so that free rows take no memory."""
        keys, values = [self._copy(x, length) for x in self.keys], [self._copy(x, length) for x in self.values]
        positions = np.full((len(self.positions), length), -1, np.int64)
        both = min(length, self.positions.shape[1])
        positions[:, :both] = self.positions[:, :both]
        self.keys, self.values, self.positions, self._written = keys, values, positions, self.lengths.copy()

    def _copy(self, x: NDArray[Any], length: int) -> NDArray[Any]:
        rows, heads, _, width = x.shape
        y = np.zeros((rows, heads, length, width), x.dtype)
        for row, used in enumerate(self.lengths.tolist()):
            y[row, :, :used] = x[row, :, :used]
        return y
