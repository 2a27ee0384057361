"""The expert kernels, emulated, against the eager op in float32 on the same 16-bit weights."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_helpers import (
    BF16,
    FP16,
    ExpertsShapeC,
    KernelError,
    Output,
    check,
    from_half,
    kernel_experts,
    library,
    pointer,
    to_half,
)

from dmoe_export.ops.experts.eager import activate, experts

COMMON = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
STEEPEST = {"silu": 1.1, "gelu_tanh": 1.13}  # slopes of the activations
KINDS = pytest.mark.parametrize("kind", [FP16, BF16], ids=["fp16", "bf16"])


@pytest.fixture(autouse=True)
def _start_seed():
    yield
    library().dmoe_emulation_seed(0)


def make_case(kind, tokens, k, count, hidden, width, ids=None, seed=0, empty=0.1):
    """Raw words of hidden, ids, pair weights, raw words of gate_up and down; ids may repeat within a token."""
    rng = np.random.default_rng(seed)
    if ids is None:
        ids = rng.integers(0, count, (tokens, k))
        ids[rng.random((tokens, k)) < empty] = -1
    return (to_half(rng.normal(size=(tokens, hidden)), kind), np.asarray(ids, np.int32),
            (rng.normal(size=(tokens, k)) * 2).astype(np.float32),
            to_half(rng.normal(size=(count, 2 * width, hidden)) / np.sqrt(hidden), kind),
            to_half(rng.normal(size=(count, hidden, width)) / np.sqrt(width), kind))


def reference(kind, hidden, ids, weights, gate_up, down, activation="silu"):
    """The result and the largest error two roundings allow: one of act(gate)·up, one of the output."""
    x, gate_up, down = (from_half(words, kind) for words in (hidden, gate_up, down))
    used = np.where((ids >= 0) & (ids < len(gate_up)), ids, -1).astype(np.int32)
    weights = np.where(used >= 0, weights, 0).astype(np.float32)
    # Eager only looks at experts in use, too. In float64: where tanh is near -1, its float32 has few digits left.
    silent = [torch.from_numpy(np.nan_to_num(a)).double() for a in (gate_up, down)]
    want = experts(torch.from_numpy(x).double(), torch.from_numpy(used), torch.from_numpy(weights), *silent,
                   activation=activation).numpy()
    unit, tiny = (2.0**-11, 2.0**-25) if kind == FP16 else (2.0**-8, 2.0**-140)
    allowed = unit * np.abs(want) + tiny
    for t, j in zip(*np.nonzero(used >= 0), strict=True):
        e = used[t, j]
        gate, up = (gate_up[e] @ x[t]).reshape(-1, 2).T
        act = np.abs(activate(torch.from_numpy(gate).double(), activation).numpy() * up)
        # float32 sums in another order, here and there, on top of the rounding
        exact = 1e-6 * (np.abs(gate_up[e]) @ np.abs(x[t])).reshape(-1, 2)
        spread = exact[:, 0] * np.abs(up) * STEEPEST[activation] + exact[:, 1] * np.abs(gate)
        allowed[t] += np.abs(weights[t, j]) * (np.abs(down[e]) @ ((unit + 2e-6) * act + tiny + spread))
    return want, allowed * 1.01


def assert_right(kind, case, activation="silu"):
    want, allowed = reference(kind, *case, activation)
    got = from_half(kernel_experts(kind, *case, activation=activation), kind)
    assert np.isfinite(got).all()
    error = np.abs(got - want)
    assert (error <= allowed).all(), f"{(error / allowed).max():.2f} times the allowed error"


@st.composite
def sizes(draw):
    return (draw(st.integers(1, 70)), draw(st.integers(1, 8)), draw(st.integers(1, 12)),
            8 * draw(st.integers(1, 17)), 8 * draw(st.integers(1, 9)))


@KINDS
@COMMON
@given(sizes(), st.integers(0, 2**32 - 1), st.integers(0, 3), st.sampled_from([0.0, 0.2, 0.9, 1.0]))
def test_any_size(kind, size, seed, order, empty):
    library().dmoe_emulation_seed(order)
    assert_right(kind, make_case(kind, *size, seed=seed, empty=empty))


@KINDS
@pytest.mark.parametrize(("tokens", "k", "count", "hidden", "width"), [
    (32, 2, 3, 2048, 24),   # gate_up: warps split k, whole steps
    (13, 3, 2, 2120, 8),    # the same with an odd tail
    (40, 1, 2, 2056, 8),    # and with eight tiles per pass
    (20, 2, 3, 8, 2048),    # down: warps split k
    (40, 2, 6, 80, 2072),
    (130, 8, 5, 136, 72),   # many tokens per expert: the other product
    (150, 1, 1, 2048, 8),
    (1030, 1, 3, 8, 8),
    (1, 1, 1, 8, 8),
    (2, 2, 1024, 8, 8),
])
@pytest.mark.parametrize("seed", [0, 2])
def test_every_variant(kind, tokens, k, count, hidden, width, seed):
    library().dmoe_emulation_seed(seed)
    assert_right(kind, make_case(kind, tokens, k, count, hidden, width, seed=tokens))


@KINDS
@pytest.mark.parametrize("tokens", [8, 9, 24, 32, 33, 64, 65, 150])
def test_one_expert_for_all(kind, tokens):
    """Whole and partial tiles and passes; the other experts' weights are NaN and must not matter."""
    hidden, ids, weights, gate_up, down = make_case(kind, tokens, 2, 7, 72, 24, np.tile([2, -1], (tokens, 1)))
    others = np.arange(7) != 2
    gate_up[others], down[others] = 0x7fff, 0x7fff
    weights[:, 1] = np.nan
    assert_right(kind, (hidden, ids, weights, gate_up, down))


@KINDS
def test_ids_that_are_no_expert_and_ids_that_repeat(kind):
    ids = np.array([[3, 3, 3], [-1, 0, -1], [4, 1, -7], [2**31 - 1, -2**31, 4], [0, 3, 0], [-1, -1, -1]])
    case = make_case(kind, 6, 3, 4, 40, 16, ids)
    assert_right(kind, case)
    mixed = from_half(kernel_experts(kind, *case), kind)
    assert not mixed[[3, 5]].any() and mixed[[0, 1, 2, 4]].any(axis=1).all()


@KINDS
def test_more_pairs_of_an_expert_than_a_pass_though_few_tokens(kind):
    assert_right(kind, make_case(kind, 9, 8, 2, 24, 16, np.ones((9, 8))))


@KINDS
def test_all_padding_reads_no_weights(kind):
    hidden, ids, weights, gate_up, down = make_case(kind, 5, 2, 3, 16, 8, empty=1.0)
    gate_up[...], down[...], weights[...] = 0x7fff, 0x7fff, np.nan
    assert not kernel_experts(kind, hidden, ids, weights, gate_up, down).any()


@KINDS
@pytest.mark.parametrize("shape", [(40, 4, 6, 136, 40), (20, 2, 3, 2120, 40), (36, 2, 3, 80, 2048)])
def test_same_bits_in_any_thread_order(kind, shape):
    case = make_case(kind, *shape, seed=9)
    results = set()
    for seed in (0, 1, 2, 1234567):  # see emulator.cpp: two ways to order threads
        library().dmoe_emulation_seed(seed)
        results.add(kernel_experts(kind, *case).tobytes())
    assert len(results) == 1


@KINDS
def test_a_token_does_not_depend_on_its_company(kind):
    """Alone or among forty, whatever the tile and the variant: the same bits."""
    hidden, ids, weights, gate_up, down = make_case(kind, 40, 3, 4, 72, 24, seed=11, empty=0)
    together = kernel_experts(kind, hidden, ids, weights, gate_up, down)
    for t in (0, 17, 39):
        alone = kernel_experts(kind, hidden[t:t + 1], ids[t:t + 1], weights[t:t + 1], gate_up, down)
        np.testing.assert_array_equal(alone[0], together[t])


def test_fp16_overflow_is_infinite_not_wrong():
    case = list(make_case(FP16, 1, 1, 1, 8, 8, [[0]]))
    case[0] = to_half(np.full((1, 8), 100.0), FP16)
    case[3], case[4] = to_half(np.full((1, 16, 8), 100.0), FP16), to_half(np.ones((1, 8, 8)), FP16)
    case[2] = np.ones((1, 1), np.float32)
    assert np.isinf(from_half(kernel_experts(FP16, *case), FP16)).all()


@pytest.mark.parametrize("change", [{"tokens": -1}, {"places": 0}, {"places": 33}, {"experts": 0}, {"experts": 1025},
                                    {"hidden": 12}, {"hidden": 0}, {"width": 4}, {"width": 1 << 19}, {"type": 2}])
def test_bad_shapes_are_refused(change):
    fields = {"tokens": 4, "places": 2, "experts": 8, "hidden": 16, "width": 8, "type": FP16} | change
    shape = ExpertsShapeC(*fields.values())
    code = -3 if "type" in change else -1
    assert library().dmoe_experts_workspace_bytes(ctypes.byref(shape)) == code
    assert library().dmoe_experts(ctypes.byref(shape), *[None] * 8) == code


def test_bad_pointers_are_refused():
    shape = ExpertsShapeC(4, 2, 8, 16, 8, FP16)
    assert library().dmoe_experts(ctypes.byref(shape), *[None] * 8) == -4
    memory = Output((4096,), np.uint8).array
    memory[...] = 0
    good = [pointer(memory[:256])] * 6 + [pointer(memory[1024:])]
    odd = [*good[:-1], ctypes.c_void_p(good[-1].value + 16)]
    assert library().dmoe_experts(ctypes.byref(shape), *odd, None) == -4, "workspace not aligned to 256"
    with pytest.raises(KernelError, match="not aligned"):
        check(library().dmoe_experts(ctypes.byref(shape), ctypes.c_void_p(good[0].value + 2), *good[1:], None))


def test_no_tokens_is_no_work():
    shape = ExpertsShapeC(0, 2, 8, 16, 8, FP16)
    assert library().dmoe_experts_workspace_bytes(ctypes.byref(shape)) > 0
    assert library().dmoe_experts(ctypes.byref(shape), *[None] * 8) == 0


def test_workspace_is_bounded():
    """Long prompts go through it in chunks of 4096 tokens, whose outputs are at most as large as those of 1024."""
    sizes = [library().dmoe_experts_workspace_bytes(ctypes.byref(ExpertsShapeC(n, 8, 256, 2048, 512, BF16)))
             for n in (32, 1024, 1025, 4096, 16384)]
    assert sizes[0] < 3e6 and sizes[1] < 80e6 and sizes[1] < sizes[2] < sizes[3] == sizes[4] < 101e6
