"""The key/value cache in host memory: arrays of bucketed length, unused rows at position −1."""

from __future__ import annotations

from typing import Any

import numpy as np

from .backend import Bools, ForwardInputs, ForwardOutputs

BUCKET = 128  # lengths come in multiples of this, so that shapes repeat and copies are rare


class HostCache:
    """Per layer keys and values [B, Hkv, S, D] and positions [B, S]; S ≥ 1 even when nothing is cached."""

    def __init__(self, rows: int, layers: int, kv_heads: int, head_dim: int, dtype: np.dtype[Any]) -> None:
        shape = (rows, kv_heads, 1, head_dim)
        self.keys = [np.zeros(shape, dtype) for _ in range(layers)]
        self.values = [np.zeros(shape, dtype) for _ in range(layers)]
        self.positions = np.full((rows, 1), -1, np.int64)
        self.lengths = np.zeros(rows, np.int64)

    def commit(self, inputs: ForwardInputs, outputs: ForwardOutputs, take: Bools) -> None:
        """Append the tokens marked in take [B, T] to their rows."""
        new_keys, new_values = outputs.keys_values
        counts = take.sum(axis=1)
        self._reserve(int((self.lengths + counts).max()))
        for row in np.flatnonzero(counts):
            where = slice(int(self.lengths[row]), int(self.lengths[row] + counts[row]))
            for cached, new in zip((*self.keys, *self.values), (*new_keys, *new_values), strict=True):
                cached[row, :, where] = new[row][:, take[row]]
            self.positions[row, where] = inputs.position_ids[row, take[row]]
        self.lengths += counts

    def clear(self, rows: list[int]) -> None:
        """Forget everything these rows have cached; the arrays keep their length, so that shapes repeat."""
        self.positions[rows], self.lengths[rows] = -1, 0

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows only, in this order."""
        self.keys = [x[rows] for x in self.keys]
        self.values = [x[rows] for x in self.values]
        self.positions, self.lengths = self.positions[rows], self.lengths[rows]

    def _reserve(self, length: int) -> None:
        have = self.positions.shape[1]
        if length <= have:
            return
        grow = -(-length // BUCKET) * BUCKET - have
        pad = ((0, 0), (0, 0), (0, grow), (0, 0))
        self.keys = [np.pad(x, pad) for x in self.keys]
        self.values = [np.pad(x, pad) for x in self.values]
        self.positions = np.pad(self.positions, ((0, 0), (0, grow)), constant_values=-1)
