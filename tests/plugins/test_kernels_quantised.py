"""Expert kernels with int8 and int4 weights, emulated: dequantised in registers, then the products of other tests."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_helpers import (
    BF16,
    FP16,
    ExpertsShapeC,
    KernelError,
    QuantisationC,
    from_half,
    kernel_experts,
    library,
    pointer,
    to_half,
)
from test_kernels_experts import KINDS, reference

BITS = pytest.mark.parametrize("bits", [8, 4], ids=["int8", "int4"])


@pytest.fixture(autouse=True)
def _start_seed():
    yield
    library().dmoe_emulation_seed(0)
    library().dmoe_emulation_bulk_copies(1)


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned integers as the kernel reads them: with 4 bits the even index in the low half of a byte."""
    return values if bits == 8 else values[..., 0::2] | values[..., 1::2] << 4


def dequantised(packed, scales, bits: int, kind: int) -> np.ndarray:
    """Words of the weights: (u − offset) · scale rounded once, as the op defines them."""
    values = packed if bits == 8 else np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)
    group = values.shape[-1] // scales.shape[-1]
    steps = np.repeat(from_half(scales, kind), group, -1)
    return to_half((values.astype(np.float32) - 2 ** (bits - 1)) * steps, kind)  # the product is exact in float32


def make_case(kind, bits, group, tokens, k, count, hidden, width, ids=None, seed=0, empty=0.1):
    """Arguments of kernel_experts with random integers and scales, and its scales."""
    rng = np.random.default_rng(seed)
    if ids is None:
        ids = rng.integers(0, count, (tokens, k))
        ids[rng.random((tokens, k)) < empty] = -1
    parts, scales = [], []
    for rows, depth in ((2 * width, hidden), (hidden, width)):
        parts.append(pack(rng.integers(0, 2**bits, (count, rows, depth), np.uint8), bits))
        spread = rng.lognormal(0, 1, (count, rows, depth // group))
        scales.append(to_half(spread / (2 ** (bits - 1) * np.sqrt(depth)), kind))
    return (to_half(rng.normal(size=(tokens, hidden)), kind), np.asarray(ids, np.int32),
            (rng.normal(size=(tokens, k)) * 2).astype(np.float32), *parts), scales


def plain(kind, bits, case, scales):
    """The same case with 16-bit weights."""
    return (*case[:3], *(dequantised(part, s, bits, kind) for part, s in zip(case[3:], scales, strict=True)))


def assert_right(kind, bits, case, scales, activation="silu"):
    want, allowed = reference(kind, *plain(kind, bits, case, scales), activation)
    got = from_half(kernel_experts(kind, *case, scales=scales, activation=activation), kind)
    assert np.isfinite(got).all()
    error = np.abs(got - want)
    assert (error <= allowed).all(), f"{(error / allowed).max():.2f} times the allowed error"


def in_order_of_lanes(kind, bits, case, scales):
    """Dequantised, with k where the kernel for 16-bit weights takes it in the order of this one; outputs to spare.

    Sizes grow to multiples of 256, with zeros: there a warp of either kernel takes every fourth piece of 32 k, except
    that of 4 bits it takes two neighbours where the other one takes two that are four pieces apart.
    """
    hidden, ids, weights, gate_up, down = plain(kind, bits, case, scales)

    def padded(array, *axes):
        return np.pad(array, [(0, -size % 256 if axis in axes else 0) for axis, size in enumerate(array.shape)])

    def order(depth):
        k = np.arange(depth).reshape(-1, 4, 2, 4, 2, 2, 2)  # 256 k, warp, piece, lane, product, its half of k, value
        k = k if bits == 4 else k.reshape(-1, 2, 4, *k.shape[3:]).swapaxes(1, 2)
        return k.transpose(0, 2, 1, 4, 5, 3, 6).ravel()  # …, piece, warp, product, half, lane, value

    hidden, down = padded(hidden, 1), padded(down, 1, 2)
    gate_up = np.pad(gate_up, ((0, 0), (0, 2 * down.shape[2] - gate_up.shape[1]), (0, -gate_up.shape[2] % 256)))
    by_hidden, by_width = order(hidden.shape[1]), order(down.shape[2])
    # Hidden sizes are k of gate_up, and the outputs of down stay; widths are k of down and row pairs of gate_up.
    rows = (2 * by_width[:, None] + [0, 1]).ravel()
    return hidden[:, by_hidden], ids, weights, gate_up[:, rows][:, :, by_hidden], down[:, :, by_width]


@st.composite
def sizes(draw):
    group = draw(st.sampled_from([32, 64, 128]))
    return (group, draw(st.integers(1, 70)), draw(st.integers(1, 8)), draw(st.integers(1, 12)),
            group * draw(st.integers(1, 256 // group + 1)), group * draw(st.integers(1, 160 // group + 1)))


@KINDS
@BITS
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(sizes(), st.integers(0, 2**32 - 1), st.integers(0, 3), st.sampled_from([0.0, 0.2, 0.9, 1.0]), st.booleans())
def test_any_size(kind, bits, size, seed, order, empty, bulk):
    library().dmoe_emulation_seed(order)
    library().dmoe_emulation_bulk_copies(bulk)
    assert_right(kind, bits, *make_case(kind, bits, *size, seed=seed, empty=empty))


@KINDS
@BITS
@pytest.mark.parametrize(("group", "tokens", "k", "count", "hidden", "width"), [
    (32, 32, 2, 3, 2048, 32),    # gate_up: warps split k
    (32, 13, 3, 2, 2144, 32),    # the same, half a block of 4 bits at the end
    (64, 40, 1, 2, 2112, 64),    # and with eight tiles per pass
    (128, 20, 2, 3, 128, 2048),  # down: warps split k
    (32, 40, 2, 6, 96, 2080),
    (64, 130, 8, 5, 128, 64),    # several passes of 64 tokens
    (32, 1030, 1, 3, 32, 32),    # more tokens than a chunk
    (32, 1, 1, 1, 32, 32),
    (32, 2, 2, 1024, 32, 32),
])
def test_every_variant(kind, bits, group, tokens, k, count, hidden, width):
    library().dmoe_emulation_seed(tokens)
    assert_right(kind, bits, *make_case(kind, bits, group, tokens, k, count, hidden, width, seed=tokens))


@KINDS
@BITS
@pytest.mark.parametrize("shape", [
    (64, 9, 3, 5, 192, 128), (128, 40, 2, 4, 640, 128), (64, 33, 2, 3, 64, 576), (32, 9, 2, 3, 352, 96)])
def test_same_bits_as_the_dequantised_weights(kind, bits, shape):
    """Whatever dequantising in registers does, the products get the very halfs that the definition names."""
    case, scales = make_case(kind, bits, *shape, seed=3)
    want = kernel_experts(kind, *in_order_of_lanes(kind, bits, case, scales))
    # Outputs of down are hidden sizes; nobody permutes those.
    np.testing.assert_array_equal(kernel_experts(kind, *case, scales=scales), want[:, :shape[4]])


@KINDS
@BITS
def test_every_integer_with_every_kind_of_scale(kind, bits):
    """Large, subnormal, negative and 0 scales; 256 neighbours hold every integer."""
    steps = to_half([1.0, -0.037, 2.0**-24, 6.2e-5, 0.0, -0.0, 3.0, 2.0**-14, 2.0**-20], kind)
    case, scales = make_case(kind, bits, 32, 6, 2, 3, 256, 256)
    integers = np.arange(3 * 512 * 256).reshape(3, 512, 256) + np.arange(512)[:, None]
    tiny = to_half(from_half(case[0], kind) / 256, kind)  # that nothing overflows
    case = tiny, *case[1:3], pack((integers % 2**bits).astype(np.uint8), bits), case[4]
    scales[0] = np.resize(steps, scales[0].shape)
    got = kernel_experts(kind, *case, scales=scales)
    assert np.isfinite(from_half(got, kind)).all() and got.any(axis=1).all()
    np.testing.assert_array_equal(got, kernel_experts(kind, *in_order_of_lanes(kind, bits, case, scales))[:, :256])


@BITS
@pytest.mark.parametrize(("group", "tokens", "hidden", "width"), [
    (32, 13, 2144, 32), (32, 40, 96, 1056), (64, 130, 128, 64), (128, 20, 128, 640)])
def test_bulk_copies_change_no_bits(bits, group, tokens, hidden, width):
    """Pieces at the end of k and of rows, several passes, rings that go round; as 8.x and as 9.0 fill them."""
    case, scales = make_case(BF16, bits, group, tokens, 2, 3, hidden, width, seed=tokens)
    results = []
    for seed, bulk in ((0, 0), (2, 1), (5, 1)):
        library().dmoe_emulation_seed(seed)
        library().dmoe_emulation_bulk_copies(bulk)
        results.append(kernel_experts(BF16, *case, scales=scales))
    np.testing.assert_array_equal(results[1], results[0])
    np.testing.assert_array_equal(results[2], results[0])


@BITS
@pytest.mark.parametrize("tokens", [1, 8, 9, 33, 65])
def test_one_expert_for_all(bits, tokens):
    """Whole and partial tiles and passes; the other experts' scales are NaN and must not matter."""
    case, scales = make_case(FP16, bits, 32, tokens, 2, 4, 96, 32, np.tile([2, -1], (tokens, 1)))
    for part in scales:
        part[[0, 1, 3]] = 0x7fff
    case[2][:, 1] = np.nan
    assert_right(FP16, bits, case, scales)


@BITS
def test_ids_that_are_no_expert_and_ids_that_repeat(bits):
    ids = np.array([[3, 3, 3], [-1, 0, -1], [4, 1, -7], [2**31 - 1, -2**31, 4], [0, 3, 0], [-1, -1, -1]])
    case, scales = make_case(FP16, bits, 32, 6, 3, 4, 64, 32, ids)
    assert_right(FP16, bits, case, scales)
    mixed = from_half(kernel_experts(FP16, *case, scales=scales), FP16)
    assert not mixed[[3, 5]].any() and mixed[[0, 1, 2, 4]].any(axis=1).all()


@KINDS
@BITS
def test_same_bits_in_any_thread_order_and_any_company(kind, bits):
    case, scales = make_case(kind, bits, 32, 40, 3, 4, 160, 96, seed=9, empty=0)
    results = []
    for seed, bulk in ((0, 0), (0, 1), (1, 1), (2, 1), (3, 0), (1234567, 1)):
        library().dmoe_emulation_seed(seed)
        library().dmoe_emulation_bulk_copies(bulk)
        results.append(kernel_experts(kind, *case, scales=scales))
    assert len({result.tobytes() for result in results}) == 1
    for t in (0, 39):
        alone = kernel_experts(kind, *(part[t:t + 1] for part in case[:3]), *case[3:], scales=scales)
        np.testing.assert_array_equal(alone[0], results[0][t])


@KINDS
@BITS
@pytest.mark.parametrize(("slots", "table"), [(5, [4, 3, 2, 1, 0]), (1, [-1] * 5), (2, [-1, 1, 0, 7, -1])],
                         ids=["all", "none", "some"])
def test_slots_give_the_same_bits(kind, bits, slots, table):
    """Experts with a slot are read from the pool and its scales alone: what they were in the master copy is spoilt."""
    case, scales = make_case(kind, bits, 64, 40, 2, 5, 128, 64, seed=5)
    want, pool, pool_scales = kernel_experts(kind, *case, scales=scales), [], []
    for part, step in zip(case[3:], scales, strict=True):
        pool.append(np.full((slots, *part.shape[1:]), 0xee, np.uint8))
        pool_scales.append(np.full((slots, *step.shape[1:]), 0x7fff, np.uint16))
        for expert, slot in enumerate(table):
            if 0 <= slot < slots:
                pool[-1][slot], pool_scales[-1][slot] = part[expert], step[expert]
                part[expert], step[expert] = 0xee, 0x7fff
    got = kernel_experts(kind, *case, pool=(table, *pool), scales=[*scales, *pool_scales])
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("change", [{"bits": 3}, {"bits": 16}, {"bits": 0}, {"group_size": 16}, {"group_size": 96},
                                    {"group_size": 0}, {"group_size": 128}, {"hidden": 72}, {"width": 48}])
def test_bad_sizes_are_refused(change):
    fields = {"bits": 4, "group_size": 64, "hidden": 64, "width": 64} | change
    shape = ExpertsShapeC(4, 2, 8, fields["hidden"], fields["width"], FP16)
    quantisation = QuantisationC(fields["bits"], fields["group_size"])
    code = library().dmoe_experts_quantised(ctypes.byref(shape), ctypes.byref(quantisation), None, *[None] * 8)
    assert code == -2
    assert b"4 or 8 bits in groups of 32, 64 or 128 that divide" in library().dmoe_error_string(code)


def test_scales_that_are_missing_or_misaligned_are_refused():
    case, scales = make_case(BF16, 8, 32, 2, 1, 3, 32, 32)
    pool = (np.full(3, -1), np.zeros((1, 64, 32)), np.zeros((1, 32, 32)))
    with pytest.raises(KernelError, match="-4: "):
        kernel_experts(BF16, *case, pool=pool, scales=scales)  # those of the pool are missing
    memory = np.zeros(1 << 14, np.uint8)
    good = pointer(memory[-memory.ctypes.data % 256:])
    shape = ExpertsShapeC(4, 2, 8, 32, 32, FP16)
    for places in ((None, good.value), (good.value, None), (good.value + 8, good.value), (good.value, good.value + 2)):
        quantisation = QuantisationC(8, 32, *places)
        assert library().dmoe_experts_quantised(ctypes.byref(shape), ctypes.byref(quantisation), None, *[good] * 7,
                                                None) == -4
