"""The routing kernel, emulated, against the eager op: ties, padding, odd blocks, limits, any thread order."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_helpers import KernelError, RouteAttributesC, kernel_route, library
from route_helpers import eager_route

from dmoe_export.ops.block_route.attributes import RouteAttributes

COMMON = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(autouse=True)
def _start_seed():
    yield
    library().dmoe_emulation_seed(0)


def assert_same(case, tolerance=2e-6):
    attributes, logits, bias, positions, chosen = case
    want = eager_route(attributes, logits, bias, positions, **chosen)
    got = kernel_route(attributes, logits, bias, positions, **chosen)
    np.testing.assert_array_equal(got[2], want[2])
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_allclose(got[1], want[1], atol=tolerance * attributes.routed_scaling)


@st.composite
def cases(draw):
    """Any sizes; scores that are multiples of 1/8 (ties everywhere) or continuous; padding and block order free."""
    groups = draw(st.sampled_from([1, 2, 3, 4, 8, 40]))
    experts = groups * draw(st.sampled_from([1, 2, 3, 5, 8, 25]))
    kept = draw(st.integers(1, groups))
    k = draw(st.integers(1, min(32, experts)))
    block = draw(st.sampled_from([1, 3, 4, 7, 32]))
    mode = draw(st.sampled_from(["token", "top_p", "top_c"]))
    softmax = draw(st.booleans())
    attributes = RouteAttributes(mode, block, k, groups, kept, draw(st.sampled_from([1.0, 2.5])),
                                 "softmax" if softmax else "sigmoid", draw(st.booleans()))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows, tokens = draw(st.integers(1, 2)), draw(st.integers(1, 13))
    if draw(st.booleans()) and not softmax:
        logits, bias = np.zeros((rows, tokens, experts)), rng.integers(-6, 3, experts) / 8
    else:
        logits, bias = rng.normal(size=(rows, tokens, experts)) * 2, rng.normal(size=experts) * 0.1
    positions = rng.integers(0, 40, (rows, 1)) + np.arange(tokens)
    order = draw(st.sampled_from(["ascending", "shuffled", "repeated", "far"]))
    if order == "shuffled":
        positions = rng.permuted(positions, axis=1)
    if order == "repeated":
        positions = rng.integers(0, 2 * block, positions.shape)
    if order == "far":
        positions = positions + (1 << 40)
    positions[rng.random((rows, tokens)) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = -1
    return attributes, logits, bias, positions, {
        "top_p": draw(st.sampled_from([0.0, 0.25, 0.5, 0.6, 0.95, 1.0, 1.5])),
        "min_experts": draw(st.sampled_from([0, 1, k, experts + 2])), "coreset_size": draw(st.integers(0, experts + 2))}


@COMMON
@given(cases(), st.integers(0, 5))
def test_equals_eager(case, seed):
    library().dmoe_emulation_seed(seed)
    assert_same(case)


@pytest.mark.parametrize(("experts", "k", "groups", "kept", "block", "mode", "tokens"), [
    (1024, 32, 16, 8, 128, "top_p", 128), (1023, 32, 1, 1, 128, "top_c", 40), (257, 5, 1, 1, 32, "token", 9),
    (256, 8, 8, 4, 32, "top_p", 96), (256, 8, 256, 40, 32, "top_c", 33), (1024, 32, 512, 64, 16, "top_p", 17),
    (1, 1, 1, 1, 32, "top_p", 5)])
def test_equals_eager_at_the_limits(experts, k, groups, kept, block, mode, tokens):
    rng = np.random.default_rng(experts + k)
    attributes = RouteAttributes(mode, block, k, groups, kept, 2.5)
    logits = rng.normal(size=(2, tokens, experts)) + 1.5 * rng.normal(size=experts)
    positions = np.stack([np.arange(tokens), np.arange(tokens) + 11])
    positions[1, tokens * 3 // 4:] = -1
    library().dmoe_emulation_seed(7)
    assert_same((attributes, logits, rng.normal(size=experts) * 0.05, positions,
                 {"top_p": 0.6, "min_experts": min(experts, 12), "coreset_size": min(experts, 48)}))


@pytest.mark.parametrize("mode", ["token", "top_p", "top_c"])
@pytest.mark.parametrize("renormalise", [True, False])
def test_a_canvas(mode, renormalise):
    """DiffusionGemma's: 256 tokens, 8 of 128 experts by softmax, one routing block or two."""
    rng = np.random.default_rng(4)
    attributes = RouteAttributes(mode, 256, 8, 1, 1, 1.0, "softmax", renormalise)
    logits = rng.normal(size=(2, 256, 128)) + 1.5 * rng.normal(size=128)
    positions = np.stack([np.arange(256), np.arange(256) + 100])
    assert_same((attributes, logits, np.zeros(128), positions, {"top_p": 0.8, "min_experts": 8, "coreset_size": 40}))


@pytest.mark.parametrize("mode", ["token", "top_p", "top_c"])
@pytest.mark.parametrize("experts", [24, 300])
def test_a_block_of_more_tokens_than_the_kernel_has_threads(mode, experts):
    """Positions may repeat: 270 tokens of one block among 300 (a block of four has 128 threads)."""
    rng = np.random.default_rng(3)
    positions = rng.integers(0, 4, (1, 300))
    positions[0, rng.permutation(300)[:30]] = 5
    attributes = RouteAttributes(mode, 4, 3, 4, 2, 2.5)
    assert_same((attributes, rng.normal(size=(1, 300, experts)), rng.normal(size=experts) * 0.1, positions,
                 {"top_p": 0.3, "min_experts": 4, "coreset_size": 9}))


@pytest.mark.parametrize(("top_p", "kept"), [(0.0, 1), (0.24, 1), (0.2499999, 1), (0.25, 2), (0.26, 2), (0.5, 3),
                                             (0.75, 4), (0.99, 4), (1.0, 4), (2.0, 4), (-1.0, 0), (np.nan, 0)])
@pytest.mark.parametrize("min_experts", [0, 6])
def test_threshold_that_is_met_exactly(top_p, kept, min_experts):
    """Four tokens vote for one expert each, a quarter of the votes per expert; nobody votes for the other 66."""
    logits = np.full((1, 4, 70), -8.0)
    logits[0, np.arange(4), [40, 3, 69, 17]] = 1.0
    attributes = RouteAttributes("top_p", 4, 1, 1, 1, 2.5)
    case = (attributes, logits, np.zeros(70), np.arange(4)[None], {"top_p": top_p, "min_experts": min_experts})
    assert_same(case)
    coreset = kernel_route(*case[:4], **case[4])[2]
    in_order = [3, 17, 40, 69, 0, 1]  # equal votes: lower experts first; then those without a vote
    assert np.flatnonzero(coreset[0, 0]).tolist() == sorted(in_order[:max(kept, min_experts)])


@pytest.mark.parametrize("voters", [3, 7, 10, 30, 33, 100])
def test_thresholds_of_equal_votes_that_are_no_binary_fractions(voters):
    """A tenth of the votes each, threshold seven tenths: the sum has to be rounded as the eager op's."""
    logits = np.full((1, voters, 128), -30.0)
    logits[0, np.arange(voters), np.arange(voters)] = 0.0
    attributes = RouteAttributes("top_p", 128, 1, 1, 1, 2.5)
    for whole in range(1, voters, max(1, voters // 15)):
        assert_same((attributes, logits, np.zeros(128), np.arange(voters)[None],
                     {"top_p": np.float32(whole / voters), "min_experts": 0}))


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("scale", [1e-30, 200.0, 3e38])
def test_extreme_logits(softmax, scale):
    """Scores of exactly 0 and 1, and exponentials beyond float32: the same ties, nothing undefined."""
    rng = np.random.default_rng(1)
    logits = np.sign(rng.normal(size=(1, 8, 40))) * scale
    attributes = RouteAttributes("top_p", 4, 6, 4, 2, 2.5, "softmax" if softmax else "sigmoid")
    assert_same((attributes, logits, np.zeros(40), np.arange(8)[None], {"top_p": 0.4, "min_experts": 7}))


@pytest.mark.parametrize("mode", ["top_p", "top_c", "token"])
def test_negative_selection_scores(mode):
    """Votes are sums of biased scores: they and their total may be negative, which turns the order round."""
    rng = np.random.default_rng(2)
    attributes = RouteAttributes(mode, 4, 3, 2, 1, 1.0)
    for shift in (-1.2, -0.7, 0.2):
        assert_same((attributes, rng.normal(size=(1, 8, 12)), rng.normal(size=12) * 0.3 + shift, np.arange(8)[None],
                     {"top_p": 0.5, "min_experts": 2, "coreset_size": 5}))


def test_experts_that_a_bias_of_minus_infinity_forbids():
    rng = np.random.default_rng(4)
    bias = np.where(np.arange(16) % 3 == 0, -np.inf, 0.0)
    assert_same((RouteAttributes("token", 4, 4, 4, 2, 2.5), rng.normal(size=(1, 5, 16)), bias, np.arange(5)[None], {}))


def test_not_a_number_stays_inside_the_outputs():
    """Any answer will do, but ids are experts or −1 and other rows are untouched."""
    rng = np.random.default_rng(6)
    logits = rng.normal(size=(2, 8, 20))
    attributes = RouteAttributes("top_p", 4, 3, 4, 2, 2.5)
    clean = kernel_route(attributes, logits, np.zeros(20), np.tile(np.arange(8), (2, 1)))
    logits[0, 2, 5], logits[0, 6] = np.nan, np.nan
    got = kernel_route(attributes, logits, np.zeros(20), np.tile(np.arange(8), (2, 1)))
    assert ((got[0] >= -1) & (got[0] < 20)).all()
    for a, b in zip(got, clean, strict=True):
        np.testing.assert_array_equal(a[1], b[1])


@pytest.mark.parametrize("mode", ["top_p", "top_c", "token"])
def test_same_bits_in_any_thread_order_and_without_coreset_output(mode):
    rng = np.random.default_rng(8)
    attributes = RouteAttributes(mode, 8, 4, 4, 2, 2.5, "softmax")
    logits, positions = rng.normal(size=(2, 21, 48)), rng.permutation(42).reshape(2, 21) - 3
    results = []
    for seed in (0, 1, 2, 99):
        library().dmoe_emulation_seed(seed)
        results.append(kernel_route(attributes, logits, np.zeros(48), np.maximum(positions, -1), min_experts=5,
                                    with_coreset=seed != 2))
    for ids, weights, _ in results[1:]:
        assert ids.tobytes() == results[0][0].tobytes() and weights.tobytes() == results[0][1].tobytes()


@pytest.mark.parametrize(("field", "value", "code"), [
    ("mode", 3, -2), ("block_length", 0, -2), ("block_length", 257, -2), ("experts_per_token", 33, -2),
    ("experts_per_token", 0, -2), ("num_groups", 7, -2), ("num_groups", 0, -2), ("groups_kept", 5, -2),
    ("groups_kept", 0, -2)])
def test_bad_attributes_are_refused(field, value, code):
    c = RouteAttributesC(1, 4, 3, 4, 2, 0, 1, 2.5)
    setattr(c, field, value)
    assert library().dmoe_block_route(ctypes.byref(c), 0, 8, 40, *[None] * 10) == code


def test_bad_sizes_and_pointers_are_refused():
    c = RouteAttributesC(1, 4, 3, 1, 1, 0, 1, 2.5)
    for sizes in ((-1, 8, 40), (65536, 8, 40), (1, -8, 40), (1, 8, 0), (1, 8, 1025)):
        assert library().dmoe_block_route(ctypes.byref(c), *sizes, *[None] * 10) == -1
    assert library().dmoe_block_route(ctypes.byref(c), 1, 8, 40, *[None] * 10) == -4
    assert library().dmoe_block_route(None, 1, 8, 40, *[None] * 10) == -4
    assert library().dmoe_block_route(ctypes.byref(c), 0, 8, 40, *[None] * 10) == 0, "nothing to do"
    with pytest.raises(KernelError, match="block length"):
        kernel_route(RouteAttributes("top_p", 300, 1, 1, 1, 1.0), np.zeros((1, 1, 4)), np.zeros(4), np.zeros((1, 1)))
