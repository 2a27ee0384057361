"""Properties of block routing that hold for any input, and agreement of all implementations, ties included."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from route_helpers import IMPLEMENTATIONS, eager_route, onnx_route

from dmoe_export.ops.block_route.attributes import RouteAttributes

BLOCK = 4
COMMON = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
# Few shapes, so that few ONNX sessions are built: (experts, k, groups, groups kept)
SIZES = [(16, 2, 4, 2), (12, 3, 1, 1), (16, 4, 8, 2), (8, 4, 4, 1), (6, 3, 6, 3)]


@st.composite
def cases(draw, modes=("token", "top_p", "top_c"), ties=None):
    """Attributes, logits, bias, positions with padding anywhere, settings."""
    experts, k, groups, kept = draw(st.sampled_from(SIZES))
    if k > kept * experts // groups:
        k = kept * experts // groups
    attributes = RouteAttributes(draw(st.sampled_from(modes)), BLOCK, k, groups, kept, 2.5)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 11))
    tied = draw(st.booleans()) if ties is None else ties
    if tied:  # scores 0.5 + multiples of 1/8: sums are exact and ties are everywhere
        logits = np.zeros((rows, tokens, experts))
        bias = rng.integers(-2, 3, experts) / 8
    else:
        logits, bias = rng.normal(size=(rows, tokens, experts)) * 2, rng.normal(size=experts) * 0.1
    starts = rng.integers(0, 9, rows)
    positions = starts[:, None] + np.arange(tokens)
    positions[rng.random((rows, tokens)) < draw(st.sampled_from([0.0, 0.3]))] = -1
    chosen = {"top_p": draw(st.sampled_from([0.0, 0.3, 0.6, 0.95, 1.0])), "min_experts": draw(st.integers(1, experts)),
              "coreset_size": draw(st.integers(1, experts))}
    return attributes, logits, bias, positions, chosen


@COMMON
@given(cases())
def test_implementations_agree(case):
    attributes, logits, bias, positions, chosen = case
    ids, weights, coreset = eager_route(attributes, logits, bias, positions, **chosen)
    ids_onnx, weights_onnx, coreset_onnx = onnx_route(attributes, logits, bias, positions, **chosen)
    np.testing.assert_array_equal(coreset_onnx, coreset)
    np.testing.assert_array_equal(ids_onnx, ids)
    np.testing.assert_allclose(weights_onnx, weights, atol=1e-5)  # ONNX Runtime's sigmoid is good to 1e-6 relative


@COMMON
@given(cases())
def test_invariants(case):
    attributes, logits, bias, positions, chosen = case
    ids, weights, coreset = eager_route(attributes, logits, bias, positions, **chosen)
    for row, token in np.ndindex(positions.shape):
        mine = ids[row, token][ids[row, token] >= 0]
        size = int(coreset[row, token].sum())
        if positions[row, token] < 0:
            assert len(mine) == 0 and size == 0 and not weights[row, token].any()
            continue
        assert coreset[row, token][mine].all(), "an expert outside the coreset"
        assert len(set(mine.tolist())) == len(mine) == min(attributes.experts_per_token, size)
        assert (ids[row, token][len(mine):] == -1).all() and (weights[row, token][len(mine):] == 0).all()
        assert weights[row, token].sum() == pytest.approx(2.5, rel=1e-5)
        if attributes.mode == "top_p":
            assert size >= chosen["min_experts"]
        if attributes.mode == "top_c":
            assert size == chosen["coreset_size"]
        same = (positions[row] // BLOCK == positions[row, token] // BLOCK) & (positions[row] >= 0)
        assert (coreset[row, same] == coreset[row, token]).all(), "tokens of a block share a coreset"


@COMMON
@given(cases(ties=False), st.integers(0, 2**32 - 1))
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_padding_and_neighbours_change_nothing(implementation, case, seed):
    attributes, logits, bias, positions, chosen = case
    rng = np.random.default_rng(seed)
    route = IMPLEMENTATIONS[implementation]
    alone = route(attributes, logits[:1], bias, positions[:1], **chosen)
    tokens = logits.shape[1]
    places = np.sort(rng.choice(tokens + 5, tokens, replace=False))
    wide = rng.normal(size=(2, tokens + 5, logits.shape[2]))
    where = np.full((2, tokens + 5), -1)
    where[1] = rng.integers(-1, 12, tokens + 5)  # a neighbour with anything
    wide[0, places], where[0, places] = logits[0], positions[0]
    for got, want in zip(route(attributes, wide, bias, where, **chosen), alone, strict=True):
        if got.dtype == np.float32:
            np.testing.assert_allclose(got[:1, places], want, atol=1e-6)
        else:
            np.testing.assert_array_equal(got[:1, places], want)


@COMMON
@given(cases(ties=False), st.integers(0, 2**32 - 1))
def test_permuting_experts_permutes_the_result(case, seed):
    attributes, logits, bias, positions, chosen = case
    experts = logits.shape[-1]
    if attributes.mode != "token":  # one group and no guard: otherwise unvoted experts and empty groups tie
        attributes = RouteAttributes(attributes.mode, BLOCK, attributes.experts_per_token, 1, 1, 2.5)
        chosen["min_experts"] = 1
    bias = np.abs(bias)  # positive selection scores: every voted expert has a positive vote
    groups = attributes.num_groups
    rng = np.random.default_rng(seed)
    order = rng.permutation(groups)[:, None] * (experts // groups) + np.stack(
        [rng.permutation(experts // groups) for _ in range(groups)])  # groups move whole, members inside them
    order = order.reshape(-1)
    ids, weights, coreset = eager_route(attributes, logits, bias, positions, **chosen)
    moved_ids, moved_weights, moved_core = eager_route(attributes, logits[..., order], bias[order], positions, **chosen)
    np.testing.assert_array_equal(moved_core, coreset[..., order])
    np.testing.assert_array_equal(np.where(moved_ids >= 0, order[moved_ids], -1), ids)
    np.testing.assert_allclose(moved_weights, weights, atol=1e-6)


@COMMON
@given(cases(modes=("top_p",), ties=False))
def test_p_of_one_is_token_routing_over_voted_experts(case):
    attributes, logits, bias, positions, _ = case
    bias = np.abs(bias)
    ids, weights, coreset = eager_route(attributes, logits, bias, positions, top_p=1.0, min_experts=1)
    select = 1 / (1 + np.exp(-logits.astype(np.float32))) + bias.astype(np.float32)
    token_mode = RouteAttributes("token", BLOCK, attributes.experts_per_token, attributes.num_groups,
                                 attributes.groups_kept, 2.5)
    for row, token in zip(*np.nonzero(positions >= 0), strict=True):
        same = (positions[row] // BLOCK == positions[row, token] // BLOCK) & (positions[row] >= 0)
        voted = np.zeros(logits.shape[-1], bool)
        for other in np.flatnonzero(same):
            voted[np.argsort(-select[row, other], kind="stable")[:attributes.experts_per_token]] = True
        np.testing.assert_array_equal(coreset[row, token], voted)
        only_voted = np.where(voted, bias, -np.inf)  # token routing that cannot see the others
        want = eager_route(token_mode, logits[row:row + 1, token:token + 1], only_voted, np.zeros((1, 1)))
        if (want[0] >= 0).all():  # otherwise the kept groups are short of voted experts, and ours refills
            np.testing.assert_array_equal(ids[row, token], want[0][0, 0])
            np.testing.assert_allclose(weights[row, token], want[1][0, 0], atol=1e-6)


@pytest.mark.parametrize(("experts", "k", "groups", "kept", "block", "mode"), [
    (1024, 32, 1, 1, 128, "top_p"), (1024, 32, 16, 8, 128, "top_c"), (256, 8, 8, 4, 32, "top_p"),
    (256, 8, 8, 4, 32, "token")])
def test_implementations_agree_at_full_size(experts, k, groups, kept, block, mode):
    rng = np.random.default_rng(experts + k)
    attributes = RouteAttributes(mode, block, k, groups, kept, 2.5)
    logits = rng.normal(size=(2, 256, experts)) + 1.5 * rng.normal(size=experts)
    positions = np.stack([np.arange(256), np.where(np.arange(256) < 200, np.arange(256) + 64, -1)])
    options = {"top_p": 0.6, "min_experts": k + groups - kept, "coreset_size": 48}
    bias = rng.normal(size=experts) * 0.05
    got = onnx_route(attributes, logits, bias, positions, **options)
    want = eager_route(attributes, logits, bias, positions, **options)
    np.testing.assert_array_equal(got[2], want[2])
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_allclose(got[1], want[1], atol=1e-5)


def test_lone_coreset_experts_refill_from_other_groups():
    """Three coreset experts in three groups, two groups kept: the third place goes to the group that was dropped."""
    attributes = RouteAttributes("top_c", BLOCK, 3, 4, 2, 2.5)
    logits = np.full((1, 1, 16), -4.0)
    logits[0, 0, [1, 6, 15]] = [1.0, 2.0, 3.0]
    for route in IMPLEMENTATIONS.values():
        ids, weights, coreset = route(attributes, logits, np.zeros(16), np.zeros((1, 1)), coreset_size=3)
        assert np.flatnonzero(coreset[0, 0]).tolist() == [1, 6, 15]
        # Lone experts' groups all score −inf, so groups 0 and 1 stay; expert 15 refills.
        assert ids[0, 0].tolist() == [6, 1, 15]
        assert weights[0, 0].sum() == pytest.approx(2.5)


def test_softmax_scores_without_renormalisation():
    attributes = RouteAttributes("token", BLOCK, 2, 1, 1, 1.0, "softmax", False)
    logits = np.log(np.array([[[0.5, 0.2, 0.2, 0.1]]]))
    for route in IMPLEMENTATIONS.values():
        ids, weights, _ = route(attributes, logits, np.zeros(4), np.zeros((1, 1)))
        assert ids[0, 0].tolist() == [0, 1]  # 1 and 2 tie: lower index
        np.testing.assert_allclose(weights[0, 0], [0.5, 0.2], atol=1e-6)
