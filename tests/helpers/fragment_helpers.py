"""Fragment order written out value by value, after the words of dmoe_export/ops/experts/fragments.py; and back."""

from __future__ import annotations

from functools import cache

import numpy as np

NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)


@cache
def places(bits: int, columns: int) -> np.ndarray:
    """Of a band of 16 rows of `columns` values: (row, column) of each value as it is stored, [16 · columns, 2]."""
    if bits > 8:
        return np.array([(row, group) for group in range(columns) for row in range(16)])
    found, block = [], 32 * 8 // bits
    for start in range(0, columns, block):
        steps = range(start, min(start + block, columns), 32)
        for lane in range(32):
            g, q = divmod(lane, 4)
            eight = range(8) if bits == 8 else NIBBLES
            found += [(2 * g + row, step + 8 * q + k) for step in steps for row in range(2) for k in eight]
    return np.array(found)


def values_of(stored: np.ndarray, bits: int) -> np.ndarray:
    """Bytes as values: of 4 bits two, the low half first."""
    return stored if bits != 4 else np.stack([stored & 15, stored >> 4], -1).reshape(*stored.shape[:-1], -1)


def in_rows(arranged: np.ndarray, bits: int) -> np.ndarray:
    """[..., rows, row of a file] in fragment order, by rows again."""
    values = values_of(arranged, bits)
    rows, columns = values.shape[-2:]
    row, column = places(bits, columns).T
    back = np.empty((values.size // (16 * columns), 16, columns), values.dtype)
    back[:, row, column] = values.reshape(len(back), -1)
    back = back.reshape(*values.shape[:-2], rows, columns)
    return back if bits != 4 else back[..., ::2] | back[..., 1::2] << 4
