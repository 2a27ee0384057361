"""The experts' product for many tokens, emulated: against the eager op, and the same bits as the product for few."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import test_kernels_quantised as quantised
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from kernel_helpers import BF16, FP16, ExpertsShapeC, kernel_experts, library, pointer
from test_kernels_experts import KINDS, make_case
from test_kernels_experts import assert_right as assert_routed
from test_kernels_mixture import assert_right, make_shared

FEW = 64 << 10  # shared memory as 7.5 has it: the product for few tokens, whatever the call


@pytest.fixture(autouse=True)
def _start_device():
    yield
    library().dmoe_emulation_seed(0)
    library().dmoe_emulation_shared_bytes(0)


def plan(tokens, places, experts, hidden, width=512, bits=16):
    """Whether the product for many tokens multiplies, tokens of a chunk, outputs of a launch of down, stages."""
    numbers = np.zeros(4, np.int32)
    shape = ExpertsShapeC(tokens, places, experts, hidden, width, FP16)
    assert library().dmoe_emulation_plan(ctypes.byref(shape), bits, pointer(numbers)) == 0
    return tuple(numbers.tolist())


def is_large(case, bits=16):
    return plan(*case[1].shape, len(case[3]), case[0].shape[1], bits=bits)[0] == 1


def with_few(kind, case, **how):
    """The result of the product for few tokens."""
    library().dmoe_emulation_shared_bytes(FEW)
    assert not is_large(case) and not is_large(case, 4)
    got = kernel_experts(kind, *case, **how)
    library().dmoe_emulation_shared_bytes(0)
    return got


@pytest.mark.parametrize(("call", "expected"), [
    ((32, 8, 256, 2048), (0, 1024, 2048, 0)),      # a step
    ((512, 8, 256, 2048), (0, 1024, 2048, 0)),     # a prefill of LLaDA2.0-mini: 16 tokens per expert
    ((512, 8, 64, 2048), (1, 4096, 2048, 6)),      # of LLaDA-MoE: 64
    ((384, 8, 64, 2048), (0, 1024, 2048, 0)),      # 48
    ((385, 8, 64, 2048), (1, 4096, 2048, 6)),
    ((1024, 8, 256, 2048), (0, 1024, 2048, 0)),
    ((1025, 8, 256, 2048), (1, 4096, 1920, 6)),    # two chunks of the other would read the experts twice
    ((4096, 8, 256, 2048), (1, 4096, 512, 6)),
    ((9000, 8, 256, 2048), (1, 4096, 512, 6)),
    ((9000, 32, 256, 2048), (1, 1024, 512, 6)),
    ((4096, 8, 1024, 72), (1, 4096, 72, 6)),       # fewer outputs than a tile has rows
])
def test_plan_on_a_hopper(call, expected):
    assert plan(*call) == expected


@pytest.mark.parametrize(("kibibytes", "experts", "expected"), [
    (163, 256, (1, 4096, 512, 4)), (99, 256, (1, 2048, 1024, 3)), (99, 1024, (1, 2048, 1024, 3)),
    (64, 256, (0, 256, 2048, 0)),
])
def test_plan_on_other_devices(kibibytes, experts, expected):
    library().dmoe_emulation_shared_bytes(kibibytes << 10)
    assert plan(4096, 8, experts, 2048) == expected


def test_plan_for_integers():
    """Further chunks of few tokens cost them nothing."""
    assert plan(1025, 8, 256, 2048, bits=8) == plan(1536, 8, 256, 2048, bits=4) == (0, 1024, 2048, 0)
    assert plan(1537, 8, 256, 2048, bits=4) == plan(1537, 8, 256, 2048, bits=8) == (1, 4096, 1280, 6)


@pytest.mark.parametrize(("tokens", "places"), [
    (32, 8), (512, 8), (1024, 8), (1025, 8), (4096, 8), (300, 32), (4096, 1), (7, 3)])
@pytest.mark.parametrize("hidden", [8, 136, 2048])
def test_workspace_never_shrinks(tokens, places, hidden):
    """TensorRT asks for the largest call and makes smaller ones in the same memory."""
    sizes = [library().dmoe_experts_workspace_bytes(ctypes.byref(ExpertsShapeC(n, places, 64, hidden, 64, BF16)))
             for n in (tokens, tokens + 1, 2 * tokens)]
    assert sizes == sorted(sizes)


@st.composite
def sizes(draw):
    return (draw(st.integers(49, 160)), draw(st.integers(1, 3)), draw(st.integers(1, 3)),
            8 * draw(st.integers(1, 34)), 8 * draw(st.integers(1, 18)), 8 * draw(st.integers(1, 18)))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(sizes(), st.integers(0, 2**32 - 1), st.integers(0, 3), st.sampled_from([0.0, 0.2]))
def test_same_bits_as_few_of_any_size(size, seed, order, empty):
    library().dmoe_emulation_seed(order)
    case, shared = make_case(FP16, *size[:5], seed=seed, empty=empty), make_shared(FP16, size[3], size[5], seed)
    assume(is_large(case))
    got = kernel_experts(FP16, *case, shared=shared)
    np.testing.assert_array_equal(got, with_few(FP16, case, shared=shared))


@KINDS
@pytest.mark.parametrize(("tokens", "k", "count", "hidden", "width", "shared"), [
    (193, 1, 1, 8, 8, 8),        # a token more than a pass; depths of one step
    (430, 1, 2, 72, 72, 136),    # passes that are not full; rows more than one tile, not a multiple of it
    (65, 2, 2, 264, 40, 520),    # depths that end in each quarter, or before it; part of a step
])
def test_every_variant(kind, tokens, k, count, hidden, width, shared):
    library().dmoe_emulation_seed(2)
    case, shared = make_case(kind, tokens, k, count, hidden, width, seed=tokens), make_shared(kind, hidden, shared)
    assert is_large(case)
    assert_right(kind, case, shared)
    np.testing.assert_array_equal(kernel_experts(kind, *case, shared=shared), with_few(kind, case, shared=shared))


def test_outputs_in_slices():
    """8200 pairs: 128 outputs, then 8; a launch more for each product and sum, and no chunk more."""
    ids = np.full((1025, 8), -1)
    ids[::9, 5], ids[1::7, 0] = 1, 0
    case, shared = make_case(FP16, 1025, 8, 2, 136, 8, ids), make_shared(FP16, 136, 8)
    assert plan(1025, 8, 2, 136)[1:3] == (4096, 128)
    before = library().dmoe_emulation_launches()
    got = kernel_experts(FP16, *case, shared=shared)
    assert library().dmoe_emulation_launches() - before == 5
    np.testing.assert_array_equal(got, with_few(FP16, case, shared=shared))
    slots = (np.array([-1, 0]), case[3][1:].copy(), case[4][1:].copy())
    case[3][1:], case[4][1:] = 0xeeee, 0xeeee
    np.testing.assert_array_equal(got, kernel_experts(FP16, *case, pool=slots, shared=shared))


def test_more_tokens_than_a_chunk():
    case = make_case(FP16, 4100, 1, 3, 8, 8, seed=2)
    np.testing.assert_array_equal(kernel_experts(FP16, *case), with_few(FP16, case))


@quantised.BITS
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from([32, 64, 128]), st.integers(49, 140), st.integers(1, 5), st.integers(1, 5), st.integers(0, 3))
def test_integers_have_the_same_bits_as_few(bits, group, tokens, hidden, width, order):
    """Any depth: fewer steps than quarters, half blocks of 4 bits, every residue of steps."""
    library().dmoe_emulation_seed(order)
    case, scales = quantised.make_case(FP16, bits, group, tokens, 1, 1, group * hidden, group * width, empty=0)
    shared = make_shared(FP16, group * hidden, 72)
    assert is_large(case, bits)
    got = kernel_experts(FP16, *case, scales=scales, shared=shared)
    np.testing.assert_array_equal(got, with_few(FP16, case, scales=scales, shared=shared))


@quantised.BITS
@pytest.mark.parametrize(("group", "tokens", "hidden", "width"), [
    (32, 130, 544, 96), (64, 65, 192, 320), (128, 97, 384, 128)])
def test_integers_are_right(bits, group, tokens, hidden, width):
    case, scales = quantised.make_case(BF16, bits, group, tokens, 2, 2, hidden, width, seed=4)
    assert is_large(case, bits)
    plain = quantised.plain(BF16, bits, case, scales)
    assert_right(BF16, case, make_shared(BF16, hidden, 40), scales, plain)


@quantised.BITS
def test_integers_in_slices_and_slots(bits):
    ids = np.full((1025, 8), -1)
    ids[::9, 5], ids[1::7, 0] = 1, 0
    case, scales = quantised.make_case(FP16, bits, 32, 1025, 8, 2, 160, 32, ids)
    assert plan(1025, 8, 2, 160, bits=bits)[2] == 128
    got = kernel_experts(FP16, *case, scales=scales)
    np.testing.assert_array_equal(got, with_few(FP16, case, scales=scales))
    slots = (np.array([-1, 0]), *(part[1:].copy() for part in case[3:]))
    both = [*scales, *(part[1:].copy() for part in scales)]
    for part in (*case[3:], *scales):
        part[1:] = 0xee
    np.testing.assert_array_equal(got, kernel_experts(FP16, *case, pool=slots, scales=both))


@KINDS
def test_long_sums(kind):
    """Several rounds of the ring in each quarter of k."""
    case = make_case(kind, 66, 1, 1, 2120, 24, seed=1)
    assert is_large(case)
    assert_routed(kind, case)
    np.testing.assert_array_equal(kernel_experts(kind, *case), with_few(kind, case))


@KINDS
@pytest.mark.parametrize("tokens", [49, 64, 65, 97, 160, 192, 201])
def test_one_expert_for_all(kind, tokens):
    """Whole and partial tiles, pairs of tiles and passes; the other experts' weights are NaN and must not matter."""
    hidden, ids, weights, gate_up, down = make_case(kind, tokens, 4, 4, 72, 24, np.tile([2, -1, 2, 9], (tokens, 1)))
    gate_up[[0, 1, 3]], down[[0, 1, 3]] = 0x7fff, 0x7fff
    weights[:, [1, 3]] = np.nan
    case = hidden, ids, weights, gate_up, down
    assert is_large(case)
    assert_routed(kind, case)


@KINDS
def test_same_bits_in_any_thread_order_any_company_and_any_slots(kind):
    case, shared = make_case(kind, 150, 2, 3, 136, 72, seed=9, empty=0), make_shared(kind, 136, 72)
    results = []
    for seed in (0, 1, 2, 1234567):
        library().dmoe_emulation_seed(seed)
        results.append(kernel_experts(kind, *case, shared=shared))
    assert is_large(case) and len({result.tobytes() for result in results}) == 1
    for t in (0, 149):
        alone = [part[t:t + 1] for part in case[:3]] + [*case[3:]]
        assert not is_large(alone)
        np.testing.assert_array_equal(kernel_experts(kind, *alone, shared=shared)[0], results[0][t])
    pool = (np.array([-1, 0, 1]), case[3][1:], case[4][1:])
    forgotten = [part.copy() for part in case[3:]]
    for part in forgotten:
        part[1:] = 0xeeee
    np.testing.assert_array_equal(kernel_experts(kind, *case[:3], *forgotten, pool=pool, shared=shared), results[0])


@pytest.mark.parametrize(("kibibytes", "tokens", "places", "bits", "stages"), [
    (99, 512, 32, 16, 3), (163, 130, 2, 16, 6), (99, 1025, 8, 4, 2), (99, 130, 2, 4, 3)])
def test_same_bits_with_the_shared_memory_of_other_devices(kibibytes, tokens, places, bits, stages):
    ids = np.full((tokens, places), -1)
    ids[::9, 1], ids[1::7, 0] = 1, 0
    case, scales = (make_case(FP16, tokens, places, 2, 264, 72, ids), None) if bits == 16 else (
        quantised.make_case(FP16, bits, 32, tokens, places, 2, 288, 64, ids))
    want = with_few(FP16, case, scales=scales)
    library().dmoe_emulation_shared_bytes(kibibytes << 10)
    assert plan(tokens, places, 2, 264, bits=bits)[::3] == (1, stages)
    np.testing.assert_array_equal(kernel_experts(FP16, *case, scales=scales), want)
