"""Integer weights in fragment order: as the tensor cores' lanes take them, for kernels on GPUs alone.

A matrix [rows, K] is cut into bands of 16 rows, a band into blocks of 512 bytes, one after the other along k: 32 k of
8 bits or 64 k of 4 bits. Lane l = 4g + q of a warp takes 16 bytes at 16·l of a block: of each 32 k ("step") the values
k = 8q … 8q + 7, first those of row 2g, then those of row 2g + 1. Eight values of 4 bits are one word with the even k in
its low 16 bits and the odd ones in its high 16 bits, so that a mask and a shift give two neighbours in two halves.
Where K is an odd multiple of 32, the last block of 4 bits is half as long: 8 bytes a lane.

Scales [rows, groups] lie as [rows / 16, groups, 16]. Both orders keep every size, so a matrix is arranged in its place.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BAND = 16
STEP = 32


def weights_in_fragments(weights: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Matrices [..., rows, K · bits / 8] of 4 or 8 bits by rows, in fragment order; the same shape.

    rows must be a multiple of 16, K of 32.
    """
    *lead, rows, row_bytes = weights.shape
    steps = row_bytes * 8 // bits // STEP
    assert rows % BAND == 0 and steps * STEP * bits == row_bytes * 8
    if bits == 8:
        units = weights.reshape(*lead, rows // BAND, 8, 2, steps, 4, 8)  # band, g, row of two, step, q, byte
        return np.ascontiguousarray(np.moveaxis(units, -3, -5)).swapaxes(-3, -2).reshape(weights.shape)
    words = _even_and_odd(weights.view("<u4")).reshape(*lead, rows // BAND, 8, 2, steps, 4)
    pairs, rest = np.split(words, [steps // 2 * 2], axis=-2)
    whole = pairs.reshape(*lead, rows // BAND, 8, 2, steps // 2, 2, 4)  # band, g, row of two, block, step, q
    whole = np.moveaxis(whole, (-3, -5, -1, -2, -4), (-5, -4, -3, -2, -1))  # block, g, q, step, row of two
    half = np.moveaxis(rest, (-2, -4, -1, -3), (-4, -3, -2, -1))
    bands = [part.reshape(*lead, rows // BAND, -1) for part in (whole, half)]
    return np.concatenate(bands, axis=-1).view(np.uint8).reshape(weights.shape)


def scales_in_fragments(scales: NDArray[np.generic]) -> NDArray[np.generic]:
    """Scales [..., rows, groups] in the order that belongs to it; the same shape."""
    *lead, rows, groups = scales.shape
    bands = scales.reshape(*lead, rows // BAND, BAND, groups)
    return np.ascontiguousarray(bands.swapaxes(-1, -2)).reshape(scales.shape)


def _even_and_odd(words: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Nibbles 0 … 7 of each word in the order 0 2 4 6 1 3 5 7, lowest first."""
    # Each line swaps neighbours in the middle of every 32, then every 16, bits.
    for mask, shift in ((0x00F000F0, 4), (0x0000FF00, 8)):
        moved = (words ^ words >> shift) & mask
        words = words ^ moved ^ moved << shift
    return words
