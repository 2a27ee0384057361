"""Softmax scores divided by the sum of the chosen (SDAR, Qwen3-MoE): eager, ONNX body and CUDA kernel alike."""

from __future__ import annotations

import numpy as np
import pytest
from route_helpers import IMPLEMENTATIONS

from dmoe_export.ops.block_route.attributes import RouteAttributes

EVERY = pytest.mark.parametrize("name", IMPLEMENTATIONS)


def defined(logits, k):
    """Ids and weights [T, k] by the definition, in float64; ties to the lower id."""
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    ids = np.argsort(-logits, axis=-1, kind="stable")[:, :k]
    chosen = np.take_along_axis(p, ids, -1)
    return ids, chosen / chosen.sum(-1, keepdims=True)


def route(name, attributes, logits, **settings):
    positions = np.arange(len(logits))[None]
    return [x[0] for x in IMPLEMENTATIONS[name](attributes, logits[None], np.zeros(logits.shape[-1]), positions,
                                                **settings)]


@EVERY
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("experts", "k"), [(128, 8), (12, 3), (12, 1), (5, 5), (1, 1)])
def test_token_routing_is_the_definition(name, experts, k, ties):
    """Sizes of SDAR-30B-A3B, of the golden model, one expert per token, all of them."""
    rng = np.random.default_rng(experts + k)
    logits = rng.integers(-3, 3, (40, experts)).astype(float) if ties else 2 * rng.normal(size=(40, experts))
    logits = logits.astype(np.float32)
    ids, weights, coreset = route(name, RouteAttributes("token", 4, k, 1, 1, 1.0, "softmax", True), logits)
    want_ids, want = defined(logits.astype(np.float64), k)
    np.testing.assert_array_equal(ids, want_ids)
    np.testing.assert_allclose(weights, want, atol=2e-6)
    assert coreset.all() and (k > 1 or (weights == 1).all())


@EVERY
@pytest.mark.parametrize("mode", ["top_p", "top_c"])
def test_block_routing_renormalises_what_is_left(name, mode):
    """Weights of a token add up to 1 over the experts of its block, ties included."""
    logits = np.random.default_rng(1).integers(-2, 3, (16, 32)).astype(np.float32)
    attributes = RouteAttributes(mode, 4, 4, 1, 1, 1.0, "softmax", True)
    settings = {"top_p": 0.4, "min_experts": 6, "coreset_size": 6}
    ids, weights, coreset = route(name, attributes, logits, **settings)
    want = route("eager", attributes, logits, **settings)
    np.testing.assert_array_equal(ids, want[0])
    np.testing.assert_allclose(weights, want[1], atol=2e-6)
    np.testing.assert_array_equal(coreset, want[2])
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
    assert (np.take_along_axis(coreset, ids, -1)).all() and 6 <= coreset.sum(-1).max() < 32


@EVERY
def test_recorded_gates(golden, name):
    """192 tokens of the reference: the same experts in its order, its weights."""
    data = np.load(golden.parent / "sdar_moe" / "forward.npz")
    for layer in range(2):
        ids, weights, _ = route(name, RouteAttributes("token", 4, 3, 1, 1, 1.0, "softmax", True),
                                data[f"layer{layer}.router_logits"])
        np.testing.assert_array_equal(ids, data[f"layer{layer}.topk_idx"])
        np.testing.assert_allclose(weights, data[f"layer{layer}.topk_weight"], atol=2e-6)
