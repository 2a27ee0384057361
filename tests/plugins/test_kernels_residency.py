"""Expert kernels over a slot pool and a table: the same bits as without, whatever is resident."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_helpers import BF16, FP16, ExpertPoolC, ExpertsShapeC, KernelError, kernel_experts, library, pointer
from test_kernels_experts import make_case

KINDS = pytest.mark.parametrize("kind", [FP16, BF16], ids=["fp16", "bf16"])
NAN = 0x7fff  # of both types


def pool_of(case, table, slots):
    """The pool that a table describes: every slot nobody has is NaN."""
    gate_up, down = case[3], case[4]
    parts = [np.full((slots, *tensor.shape[1:]), NAN, np.uint16) for tensor in (gate_up, down)]
    for expert, slot in enumerate(table):
        if 0 <= slot < slots:
            for part, tensor in zip(parts, (gate_up, down), strict=True):
                part[slot] = tensor[expert]
    return np.asarray(table, np.int32), *parts


def forgotten(case, table, slots):
    """The case with NaN where the master copy of a resident expert was: nobody may read it there."""
    resident = [expert for expert, slot in enumerate(table) if 0 <= slot < slots]
    gate_up, down = case[3].copy(), case[4].copy()
    gate_up[resident], down[resident] = NAN, NAN
    return (*case[:3], gate_up, down)


@st.composite
def tables(draw):
    """Sizes of a case, slots, and a table: any experts resident, each in a slot of its own or in none."""
    size = (draw(st.integers(1, 40)), draw(st.integers(1, 4)), draw(st.integers(1, 10)),
            8 * draw(st.integers(1, 9)), 8 * draw(st.integers(1, 5)))
    slots = draw(st.integers(1, size[2]))
    places = draw(st.permutations([*range(slots), *[-1] * (size[2] - slots)]))
    dropped = draw(st.sets(st.integers(0, size[2] - 1)))
    nowhere = draw(st.sampled_from([-1, -2**31, slots, 2**31 - 1]))  # all of them mean "not in the pool"
    return size, slots, [nowhere if e in dropped or p < 0 else p for e, p in enumerate(places)]


@KINDS
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(tables(), st.integers(0, 2**32 - 1), st.integers(0, 3))
def test_any_table_gives_the_same_bits(kind, drawn, seed, order):
    size, slots, table = drawn
    case = make_case(kind, *size, seed=seed)
    want = kernel_experts(kind, *case)
    library().dmoe_emulation_seed(order)
    try:
        got = kernel_experts(kind, *forgotten(case, table, slots), pool=pool_of(case, table, slots))
    finally:
        library().dmoe_emulation_seed(0)
    np.testing.assert_array_equal(got, want)


@KINDS
@pytest.mark.parametrize(("tokens", "k", "count", "hidden", "width"), [
    (32, 2, 5, 2048, 24),   # warps split k
    (40, 1, 5, 2056, 8),    # the same with eight tiles per pass
    (20, 2, 5, 8, 2048),
    (130, 4, 5, 136, 72),   # an expert takes several passes
    (1030, 1, 3, 8, 8),     # chunks
])
@pytest.mark.parametrize("resident", ["all", "none", "some"])
def test_every_variant(kind, tokens, k, count, hidden, width, resident):
    case = make_case(kind, tokens, k, count, hidden, width, seed=tokens)
    slots = {"all": count, "none": 1, "some": 2}[resident]
    table = {"all": list(range(count))[::-1], "none": [-1] * count, "some": [-1, 1, 0, *[-1] * (count - 3)]}[resident]
    got = kernel_experts(kind, *forgotten(case, table, slots), pool=pool_of(case, table, slots))
    np.testing.assert_array_equal(got, kernel_experts(kind, *case))


def test_the_pool_is_what_is_read():
    """A slot that holds another expert's weights changes the result: the table is not ignored."""
    case = make_case(FP16, 8, 1, 3, 16, 8, np.full((8, 1), 1))
    pool = pool_of(case, [-1, 0, -1], 1)
    pool[1][0], pool[2][0] = case[3][2], case[4][2]
    other = kernel_experts(FP16, *case[:1], np.full((8, 1), 2, np.int32), *case[2:])
    np.testing.assert_array_equal(kernel_experts(FP16, *case, pool=pool), other)
    assert (kernel_experts(FP16, *case) != other).any()


@pytest.mark.parametrize("slots", [0, 4])
def test_slots_out_of_range_are_refused(slots):
    case = make_case(FP16, 2, 1, 3, 16, 8)
    pool = (np.full(3, -1, np.int32), np.zeros((slots, 16, 16), np.uint16), np.zeros((slots, 16, 8), np.uint16))
    with pytest.raises(KernelError, match=r"-1: .* slots 1..experts"):
        kernel_experts(FP16, *case, pool=pool)


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_missing_and_misaligned_pointers_are_refused(missing):
    memory = np.zeros(1 << 14, np.uint8)
    good = pointer(memory[-memory.ctypes.data % 256:])
    shape = ExpertsShapeC(4, 2, 8, 16, 8, FP16)
    for bad in (None, good.value + 8):
        places = [good.value] * 3
        places[missing] = bad
        pool = ExpertPoolC(1, *places)
        assert library().dmoe_experts_resident(ctypes.byref(shape), ctypes.byref(pool), *[good] * 7, None) == -4
