"""Fragment order: the quick way against the definition written out value by value."""

from __future__ import annotations

import numpy as np
import pytest
from fragment_helpers import in_rows, places, values_of

from dmoe_export.ops.experts import fragments
from dmoe_export.ops.experts.fragments import Fragments, scales_in_fragments, weights_in_fragments

ROWS = [(16, 32), (32, 96), (16, 160), (48, 64), (64, 2048)]  # and K: also odd multiples of 32


def drawn(shape, dtype=np.uint8):
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.random.default_rng(size).integers(0, 256, size, np.uint8).view(dtype).reshape(shape)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("rows", "depth"), ROWS)
def test_weights(bits, rows, depth):
    weights = drawn((3, rows, depth * bits // 8))
    arranged = weights_in_fragments(weights, bits)
    assert arranged.shape == weights.shape and arranged.dtype == np.uint8
    row, column = places(bits, depth).T
    bands = values_of(weights, bits).reshape(3, rows // 16, 16, depth)
    np.testing.assert_array_equal(values_of(arranged, bits).reshape(3, rows // 16, -1), bands[:, :, row, column])
    np.testing.assert_array_equal(in_rows(arranged, bits), weights)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@pytest.mark.parametrize("groups", [1, 3, 32])
def test_scales(dtype, groups):
    scales = drawn((2, 32, groups), dtype)
    arranged = scales_in_fragments(scales)
    np.testing.assert_array_equal(arranged.reshape(2, 2, groups, 16), scales.reshape(2, 2, 16, groups).swapaxes(2, 3))
    np.testing.assert_array_equal(in_rows(arranged, 8 * scales.itemsize), scales)


def test_a_word_of_four_bits():
    """A mask and a shift give neighbours in k: what the kernels do."""
    rows = np.zeros((16, 16), np.uint8)
    rows[0, :4] = 0x10, 0x32, 0x54, 0x76  # k 0 … 7 are 0 … 7
    word = int(weights_in_fragments(rows, 4).reshape(-1).view("<u4")[0])
    assert [word >> 4 * shift & 0x000F000F for shift in range(4)] == [0x10000, 0x30002, 0x50004, 0x70006]


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("bands", [0, 1, 7])
def test_pieces_and_threads(monkeypatch, bits, bands):
    """However the bands are shared out: the same bytes, and all of them."""
    monkeypatch.setattr(fragments.os, "cpu_count", lambda: 3)
    order = Fragments(bits, 96)
    source = drawn((bands * order.band_bytes,))
    want = np.concatenate([_alone(order, part) for part in np.split(source, bands)]) if bands else source
    for piece in (1, 2 * order.band_bytes, 1 << 20):
        monkeypatch.setattr(fragments, "_PIECE", piece)
        target = np.full_like(source, 0x55)
        order.arrange(source, target)
        np.testing.assert_array_equal(target, want)


def _alone(order, band):
    target = np.empty_like(band)
    order.arrange(band, target)
    return target


@pytest.mark.parametrize(("order", "size"), [(Fragments(8, 96), 96 * 15), (Fragments(4, 24), 24 * 16)])
def test_no_half_bands_and_no_half_steps(order, size):
    with pytest.raises(AssertionError):
        order.arrange(np.zeros(size, np.uint8), np.zeros(size, np.uint8))
