"""The router's kernels, emulated: exact sums of float32 products, and routing as `DmoeBlockRoute` on these logits."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_helpers import BF16, FP16, from_half, kernel_route, library, route_attributes, to_half
from route_helpers import eager_route
from router_helpers import RouterShapeC, kernel_router, router_workspace

from dmoe_export.ops.block_route.attributes import RouteAttributes

COMMON = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
KINDS = pytest.mark.parametrize("kind", [FP16, BF16], ids=["fp16", "bf16"])


@pytest.fixture(autouse=True)
def _start_seed():
    yield
    library().dmoe_emulation_seed(0)


def make_case(kind, rows, tokens, experts, hidden, seed=0):
    rng = np.random.default_rng(seed)
    return (to_half(rng.normal(size=(rows * tokens, hidden)), kind),
            (rng.normal(size=(experts, hidden)) / np.sqrt(hidden)).astype(np.float32),
            (rng.normal(size=experts) * 0.05).astype(np.float32), np.tile(np.arange(tokens), (rows, 1)) + 3)


def assert_right(kind, attributes, case, **chosen):
    """Logits within float32's error of that many additions one after another; ids and weights follow from them."""
    hidden, weight, bias, positions = case
    ids, weights, logits = kernel_router(kind, attributes, *case, **chosen)
    x = from_half(hidden, kind).astype(np.float64)
    size, experts = x.shape[1], len(weight)
    exact = (x @ weight.T.astype(np.float64)).reshape(logits.shape)
    additions = 8 * -(-size // 2048) + 5 + 7  # in a thread, across the warp, across the block
    allowed = additions * 2.0**-24 * (np.abs(x) @ np.abs(weight.T).astype(np.float64)).reshape(logits.shape) * 1.0001
    assert (np.abs(logits - exact) <= allowed).all(), (np.abs(logits - exact) / allowed).max()
    want = eager_route(attributes, logits, bias, positions, **chosen)
    np.testing.assert_array_equal(ids, want[0].reshape(ids.shape))
    np.testing.assert_allclose(weights, want[1].reshape(ids.shape), atol=2e-6 * attributes.routed_scaling)
    same = kernel_route(attributes, logits, bias, positions, **chosen)
    assert ids.tobytes() == same[0].tobytes() and weights.tobytes() == same[1].tobytes()
    assert experts == logits.shape[2]
    return ids, weights, logits


@KINDS
@COMMON
@given(rows=st.integers(1, 3), tokens=st.integers(1, 21), experts=st.integers(4, 45), units=st.integers(1, 40),
       mode=st.sampled_from(["token", "top_p", "top_c"]), softmax=st.booleans(), seed=st.integers(0, 2**20))
def test_any_size(kind, rows, tokens, experts, units, mode, softmax, seed):
    attributes = RouteAttributes(mode, 8, 3, 1, 1, 2.5, "softmax" if softmax else "sigmoid")
    case = make_case(kind, rows, tokens, experts, 8 * units, seed)
    case[3][seed % rows, tokens // 2:] = -1
    library().dmoe_emulation_seed(seed % 4)
    assert_right(kind, attributes, case, top_p=0.5, min_experts=4, coreset_size=5)


@KINDS
@pytest.mark.parametrize("mode", ["token", "top_p", "top_c"])
def test_a_models_sizes(kind, mode):
    """LLaDA2.0-mini's router; its hidden size is one pass of the thread block."""
    groups = (1, 1) if mode == "top_c" else (8, 4)
    attributes = RouteAttributes(mode, 32, 8, *groups, 2.5)
    assert_right(kind, attributes, make_case(kind, 1, 32, 256, 2048), top_p=0.6, min_experts=12, coreset_size=48)


@KINDS
@pytest.mark.parametrize(("experts", "hidden"), [(9, 4096), (8, 2056), (300, 24), (1, 8)])
def test_several_passes_and_ragged_edges(kind, experts, hidden):
    attributes = RouteAttributes("top_p", 4, min(3, experts), 1, 1, 1.0, "softmax", False)
    assert_right(kind, attributes, make_case(kind, 2, 13, experts, hidden, 7), top_p=0.4, min_experts=2)


@KINDS
def test_a_token_does_not_depend_on_its_company_nor_on_the_order_of_threads(kind):
    attributes = RouteAttributes("token", 32, 4, 4, 2, 2.5)
    case = make_case(kind, 2, 37, 40, 2056)
    together = kernel_router(kind, attributes, *case)
    for seed in (1, 2, 77):
        library().dmoe_emulation_seed(seed)
        again = kernel_router(kind, attributes, *case)
        assert all(a.tobytes() == b.tobytes() for a, b in zip(together, again, strict=True))
    for token in (0, 20, 73):
        alone = kernel_router(kind, attributes, case[0][token:token + 1], case[1], case[2],
                              case[3].reshape(-1, 1)[token:token + 1])
        assert alone[0][0].tobytes() == together[0][token].tobytes()
        assert alone[2].tobytes() == together[2].reshape(-1, 40)[token].tobytes()


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_without_the_logits_output(score):
    attributes = RouteAttributes("top_p", 8, 3, 2, 1, 2.5, score)
    case = make_case(BF16, 1, 19, 24, 64)
    with_logits, without = (kernel_router(BF16, attributes, *case, with_logits=given) for given in (True, False))
    assert without[2] is None
    assert [x.tobytes() for x in with_logits[:2]] == [x.tobytes() for x in without[:2]]


def test_not_a_number_and_infinity_stay_with_their_token():
    attributes = RouteAttributes("token", 8, 3, 4, 2, 2.5)
    case = make_case(FP16, 1, 16, 20, 32)
    clean = kernel_router(FP16, attributes, *case)
    case[0][3, 5], case[0][9, 0] = 0x7e00, 0x7c00
    got = kernel_router(FP16, attributes, *case)
    others = [t for t in range(16) if t not in (3, 9)]
    assert ((got[0] >= -1) & (got[0] < 20)).all() and np.isnan(got[2][0, 3]).all()
    assert got[0][others].tobytes() == clean[0][others].tobytes()
    assert got[2][0, others].tobytes() == clean[2][0, others].tobytes()


@pytest.mark.parametrize(("change", "code"), [
    ({"rows": -1}, -1), ({"rows": 65536}, -1), ({"tokens": -1}, -1), ({"experts": 0}, -1), ({"experts": 1025}, -1),
    ({"hidden": 12}, -1), ({"hidden": 0}, -1), ({"hidden": 1 << 19}, -1), ({"type": 2}, -3),
    ({"rows": 60000, "tokens": 60000}, -1)])
def test_bad_shapes_are_refused(change, code):
    shape = RouterShapeC(*({"rows": 1, "tokens": 8, "experts": 16, "hidden": 64, "type": FP16} | change).values())
    c = route_attributes(RouteAttributes("token", 8, 3, 4, 2, 2.5))
    assert router_workspace(shape) == code
    assert library().dmoe_router(ctypes.byref(shape), ctypes.byref(c), *[None] * 12) == code


def test_bad_attributes_and_pointers_are_refused():
    shape = RouterShapeC(1, 8, 16, 64, FP16)
    c = route_attributes(RouteAttributes("token", 8, 17, 4, 2, 2.5))
    assert library().dmoe_router(ctypes.byref(shape), ctypes.byref(c), *[None] * 12) == -2
    c = route_attributes(RouteAttributes("token", 8, 3, 4, 2, 2.5))
    assert library().dmoe_router(ctypes.byref(shape), ctypes.byref(c), *[None] * 12) == -4
    assert library().dmoe_router(ctypes.byref(shape), None, *[None] * 12) == -4
    empty = RouterShapeC(1, 0, 16, 64, FP16)
    assert router_workspace(empty) == 0
    assert library().dmoe_router(ctypes.byref(empty), ctypes.byref(c), *[None] * 12) == 0
