"""Integer weights in fragment order: as the tensor cores' lanes take them, for kernels on GPUs alone.

A matrix [rows, K] is cut into bands of 16 rows, a band into blocks of 512 bytes, one after the other along k: 32 k of
8 bits or 64 k of 4 bits. Lane l = 4g + q of a warp takes 16 bytes at 16·l of a block: of each 32 k ("step") the values
k = 8q … 8q + 7, first those of row 2g, then those of row 2g + 1. Eight values of 4 bits are one word with the even k in
its low 16 bits and the odd ones in its high 16 bits, so that a mask and a shift give two neighbours in two halves.
Where K is an odd multiple of 32, the last block of 4 bits is half as long: 8 bytes a lane.

Scales [rows, groups] lie as [rows / 16, groups, 16]. Both orders keep every size, so a matrix is arranged in its place.
Files keep rows; what goes to a GPU is arranged on the way (docs/bundle.md).
"""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

LAYOUT = 2
"""The layout of quantised experts on a GPU: 2 is fragment order, 1 was rows."""
BAND = 16
STEP = 32
_PIECE = 1 << 17  # bytes that stay in a core's cache from the first pass over them to the last
_MOST_THREADS = 8  # more would only wait for memory
_UNITS = {8: np.uint64, 4: np.uint32, 16: np.uint16, 32: np.uint32}  # what is moved as one


@dataclass(frozen=True)
class Fragments:
    """Fragment order of matrices with `row_bytes` bytes a row.

    `bits` of a value: 8 and 4 are weights, K a multiple of 32; 16 and 32 are scales.
    """

    bits: int
    row_bytes: int

    @property
    def band_bytes(self) -> int:
        """What is arranged by itself: 16 rows."""
        return BAND * self.row_bytes

    def arrange(self, rows: NDArray[np.uint8], target: NDArray[np.uint8]) -> None:
        """Bytes of whole bands, by rows, into memory elsewhere of the same size; uses several cores."""
        assert rows.nbytes == target.nbytes and rows.nbytes % self.band_bytes == 0
        each = max(_PIECE // self.band_bytes, 1) * self.band_bytes
        starts = range(0, rows.nbytes, each)
        threads = min(len(starts), _MOST_THREADS, os.cpu_count() or 1)

        def some(which: int) -> None:
            spare = np.empty(each // 4, np.uint32)
            for start in starts[which::threads]:
                self._piece(rows[start:start + each], target[start:start + each], spare)

        if threads < 2:
            deque(map(some, range(threads)), 0)
        else:
            with ThreadPoolExecutor(threads) as pool:
                deque(pool.map(some, range(threads)), 0)

    def _piece(self, rows: NDArray[np.uint8], target: NDArray[np.uint8], spare: NDArray[np.uint32]) -> None:
        unit, order = _UNITS[self.bits], _order(self)
        bands, arranged = (part.view(unit).reshape(-1, len(order)) for part in (rows, target))
        np.take(bands, order, axis=1, out=arranged, mode="clip")  # "raise" would go through a copy
        if self.bits == 4:
            words = target.view(np.uint32)
            _even_and_odd(words, spare[:len(words)])


@lru_cache(maxsize=16)
def _order(of: Fragments) -> NDArray[np.intp]:
    """Of a band's units: which one of the rows comes at each place."""
    units = np.arange(of.band_bytes // np.dtype(_UNITS[of.bits]).itemsize, dtype=np.intp)
    if of.bits > 8:
        return np.ascontiguousarray(units.reshape(BAND, -1).T).ravel()
    assert of.row_bytes * 8 % (STEP * of.bits) == 0, "K is no multiple of 32"
    lanes = units.reshape(8, 2, -1, 4)  # g, row of two, step, q
    each = 8 // of.bits  # steps of a block
    whole, rest = np.split(lanes, [lanes.shape[2] // each * each], axis=2)
    blocks = whole.reshape(8, 2, -1, each, 4).transpose(2, 0, 4, 3, 1)  # block, g, q, step, row of two
    return np.concatenate([blocks.ravel(), rest.transpose(2, 0, 3, 1).ravel()])


def _even_and_odd(words: NDArray[np.uint32], spare: NDArray[np.uint32]) -> None:
    """Nibbles 0 … 7 of each word in the order 0 2 4 6 1 3 5 7, lowest first; in place."""
    # Each turn swaps neighbours in the middle of every 16, then of every 32, bits: what differs is flipped in both.
    for mask, shift in ((0x00F000F0, 4), (0x0000FF00, 8)):
        np.right_shift(words, np.uint32(shift), out=spare)
        np.bitwise_xor(spare, words, out=spare)
        np.bitwise_and(spare, np.uint32(mask), out=spare)
        np.multiply(spare, np.uint32((1 << shift) + 1), out=spare)
        np.bitwise_xor(words, spare, out=words)


def weights_in_fragments(weights: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Matrices [..., rows, K · bits / 8] of 4 or 8 bits by rows, in fragment order; the same shape.

    rows must be a multiple of 16, K of 32.
    """
    return _arranged(weights, bits)


def scales_in_fragments(scales: NDArray[Any]) -> NDArray[Any]:
    """Scales [..., rows, groups] in the order that belongs to it; the same shape."""
    return _arranged(scales, scales.itemsize * 8)


def _arranged(values: NDArray[Any], bits: int) -> NDArray[Any]:
    values = np.ascontiguousarray(values)
    assert values.shape[-2] % BAND == 0
    arranged = np.empty_like(values)
    order = Fragments(bits, values.shape[-1] * values.itemsize)
    order.arrange(values.reshape(-1).view(np.uint8), arranged.reshape(-1).view(np.uint8))
    return arranged
