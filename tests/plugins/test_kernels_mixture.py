"""`dmoe_mixture`, emulated: the routed experts and the shared expert in one call, against the eager op in float32."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import test_kernels_quantised as quantised
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_helpers import (
    FP16,
    ExpertsShapeC,
    KernelError,
    SharedExpertC,
    from_half,
    kernel_experts,
    library,
    pointer,
    to_half,
)
from test_kernels_experts import KINDS, make_case, reference

from dmoe_export.ops.mixture.eager import mixture

NAN = 0x7fff  # of both types


@pytest.fixture(autouse=True)
def _start_seed():
    yield
    library().dmoe_emulation_seed(0)
    library().dmoe_emulation_shared_bytes(0)
    library().dmoe_emulation_bulk_copies(1)


def make_shared(kind, hidden, width, seed=0):
    """Raw words of gate_up [2·width, hidden] and down [hidden, width]."""
    rng = np.random.default_rng(seed + 1)
    return (to_half(rng.normal(size=(2 * width, hidden)) / np.sqrt(hidden), kind),
            to_half(rng.normal(size=(hidden, width)) / np.sqrt(width), kind))


def as_routed(case, shared):
    """The shared expert as the only expert, with weight 1: arguments of `reference` in its layout."""
    gate_up, down = shared
    interleaved = gate_up.reshape(2, -1, gate_up.shape[1]).swapaxes(0, 1).reshape(gate_up.shape)
    tokens = len(case[0])
    return (case[0], np.zeros((tokens, 1), np.int32), np.ones((tokens, 1), np.float32), interleaved[None], down[None])


def assert_right(kind, case, shared, scales=None, plain=None, activation="silu"):
    """`plain`: the case with 16-bit weights, where the kernel gets integers."""
    plain = plain or case
    routed, allowed = reference(kind, *plain, activation)
    common, also_allowed = reference(kind, *as_routed(case, shared), activation)
    unit = 2.0**-11 if kind == FP16 else 2.0**-8
    # Both bounds have room for a rounding of their own result; the sum is rounded once.
    want, allowed = routed + common, allowed + also_allowed + unit * np.abs(routed + common)
    got = from_half(kernel_experts(kind, *case, scales=scales, shared=shared, activation=activation), kind)
    assert np.isfinite(got).all()
    error = np.abs(got - want)
    assert (error <= allowed).all(), f"{(error / allowed).max():.2f} times the allowed error"


def test_reference_is_the_op():
    case, shared = make_case(FP16, 5, 2, 3, 24, 16, empty=0), make_shared(FP16, 24, 8)
    floats = [torch.from_numpy(from_half(part, FP16)) for part in (case[0], case[3], case[4], *shared)]
    want = mixture(floats[0], torch.from_numpy(case[1]), torch.from_numpy(case[2]), *floats[1:]).numpy()
    got = reference(FP16, *case)[0] + reference(FP16, *as_routed(case, shared))[0]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@st.composite
def sizes(draw):
    return (draw(st.integers(1, 70)), draw(st.integers(1, 6)), draw(st.integers(1, 9)),
            8 * draw(st.integers(1, 20)), 8 * draw(st.integers(1, 9)), 8 * draw(st.integers(1, 20)))


@KINDS
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(sizes(), st.integers(0, 2**32 - 1), st.integers(0, 3), st.sampled_from([0.0, 0.2, 1.0]))
def test_any_size(kind, size, seed, order, empty):
    library().dmoe_emulation_seed(order)
    case = make_case(kind, *size[:5], seed=seed, empty=empty)
    assert_right(kind, case, make_shared(kind, size[3], size[5], seed))


@KINDS
@pytest.mark.parametrize(("tokens", "k", "count", "hidden", "width", "shared"), [
    (32, 2, 3, 520, 24, 136),  # a ring that goes round, tails of k in both
    (20, 2, 3, 72, 520, 24),   # the shared expert narrower
    (130, 2, 9, 136, 72, 72),  # several passes of 64 tokens
    (1030, 1, 2, 8, 8, 16),    # many tokens per expert: the other product
    (1, 1, 1, 8, 8, 8),
])
@pytest.mark.parametrize("seed", [0, 2])
def test_every_variant(kind, tokens, k, count, hidden, width, shared, seed):
    library().dmoe_emulation_seed(seed)
    case = make_case(kind, tokens, k, count, hidden, width, seed=tokens)
    assert_right(kind, case, make_shared(kind, hidden, shared))


@KINDS
@quantised.BITS
@pytest.mark.parametrize(("group", "tokens", "hidden", "width", "shared"), [
    (32, 32, 544, 96, 136), (64, 40, 128, 320, 8), (128, 9, 128, 128, 264)])
def test_integers_beside_a_shared_expert_of_floats(kind, bits, group, tokens, hidden, width, shared):
    library().dmoe_emulation_seed(group)
    case, scales = quantised.make_case(kind, bits, group, tokens, 2, 3, hidden, width, seed=4)
    plain = quantised.plain(kind, bits, case, scales)
    assert_right(kind, case, make_shared(kind, hidden, shared), scales, plain)


@KINDS
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_same_bits_in_any_thread_order_any_company_and_any_slots(kind, bits):
    shared = make_shared(kind, 160, 72)
    if bits == 16:
        case, scales = make_case(kind, 40, 3, 4, 160, 96, seed=9, empty=0), None
    else:
        case, scales = quantised.make_case(kind, bits, 32, 40, 3, 4, 160, 96, seed=9, empty=0)
    results = []
    for seed in (0, 1, 2, 1234567):
        library().dmoe_emulation_seed(seed)
        results.append(kernel_experts(kind, *case, scales=scales, shared=shared))
    assert len({result.tobytes() for result in results}) == 1
    for t in (0, 39):
        alone = kernel_experts(kind, *(part[t:t + 1] for part in case[:3]), *case[3:], scales=scales, shared=shared)
        np.testing.assert_array_equal(alone[0], results[0][t])
    pool = (np.array([-1, 0, 1, -1]), case[3][1:3], case[4][1:3])
    both = scales and [*scales, *(part[1:3] for part in scales)]
    forgotten = [part.copy() for part in case[3:]]
    for part in forgotten:
        part[1:3] = 0xee
    got = kernel_experts(kind, *case[:3], *forgotten, pool=pool, scales=both, shared=shared)
    np.testing.assert_array_equal(got, results[0])


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize(("tokens", "count", "hidden"), [
    (9, 5, 288), (70, 5, 288), (300, 3, 288), (1030, 2, 32), (33, 1024, 32)])
def test_same_bits_whatever_shared_memory_a_device_has(bits, tokens, count, hidden):
    """As 7.5, 8.6 and 12.0, 8.0, and 9.0 have it: rings of two to six stages, four or eight tiles, shorter chunks."""
    shared = make_shared(FP16, hidden, 40)
    if bits == 16:
        case, scales = make_case(FP16, tokens, 1, count, hidden, 32, seed=tokens), None
    else:
        case, scales = quantised.make_case(FP16, bits, 32, tokens, 1, count, hidden, 32, seed=3)
    results = set()
    for kibibytes in (64, 99, 163, 227):
        library().dmoe_emulation_shared_bytes(kibibytes << 10)
        library().dmoe_emulation_bulk_copies(kibibytes in (99, 227))  # 8.6 has none, 12.0 has
        results.add(kernel_experts(FP16, *case, scales=scales, shared=shared).tobytes())
    assert len(results) == 1


@KINDS
def test_tokens_without_experts_still_have_the_shared_one(kind):
    case, shared = list(make_case(kind, 9, 2, 3, 40, 16, empty=1.0)), make_shared(kind, 40, 24)
    case[2][...], case[3][...], case[4][...] = np.nan, NAN, NAN
    got = kernel_experts(kind, *case, shared=shared)
    alone = as_routed(case, shared)
    np.testing.assert_array_equal(got, kernel_experts(kind, *alone))


@pytest.mark.parametrize("width", [0, -8, 12, 1 << 19])
def test_bad_widths_are_refused(width):
    shape, shared = ExpertsShapeC(4, 2, 8, 16, 8, FP16), SharedExpertC(width)
    assert library().dmoe_mixture_workspace_bytes(ctypes.byref(shape), ctypes.byref(shared)) == -1
    assert library().dmoe_mixture(ctypes.byref(shape), ctypes.byref(shared), *[None] * 10) == -1


def test_bad_pointers_are_refused():
    case, shared = make_case(FP16, 2, 1, 3, 16, 8), make_shared(FP16, 16, 8)
    kernel_experts(FP16, *case, shared=shared)
    memory = np.zeros(1 << 14, np.uint8)
    good = pointer(memory[-memory.ctypes.data % 256:])
    for places in ((None, good.value), (good.value, None), (good.value + 8, good.value)):
        common = SharedExpertC(8, *places)
        shape = ExpertsShapeC(4, 2, 8, 16, 8, FP16)
        assert library().dmoe_mixture(ctypes.byref(shape), ctypes.byref(common), None, None, *[good] * 7, None) == -4
    with pytest.raises(KernelError, match="-1: "):
        kernel_experts(FP16, *case, shared=make_shared(FP16, 16, 4))
