"""One forward of the golden model: eager and exported, block routing and token routing, against the recording."""

from __future__ import annotations

import numpy as np
import torch
from bundles import cpu_session, eager, full_forward


def _same_sets(got, want):
    np.testing.assert_array_equal(np.sort(got, -1), np.sort(want, -1))


def test_eager_forward(golden):
    data = np.load(golden / "forward.npz")
    model = eager(golden / "model")._model
    ids = torch.from_numpy(data["full.input_ids"])
    with torch.no_grad():
        out = model(ids, torch.arange(ids.shape[1])[None])
    np.testing.assert_allclose(out.logits.numpy(), data["full.logits"], atol=2e-4)
    for layer in range(3):
        np.testing.assert_allclose(out.keys[layer].numpy(), data[f"full.layer{layer}.key"], atol=2e-4)
        np.testing.assert_allclose(out.values[layer].numpy(), data[f"full.layer{layer}.value"], atol=2e-4)
    for layer in range(2):
        np.testing.assert_allclose(out.router_logits[layer].numpy(), data[f"full.layer{layer}.router_logits"],
                                   atol=2e-4)
        _same_sets(out.expert_ids[layer].numpy(), data[f"full.layer{layer}.topk_idx"])


def test_eager_token_routing(golden):
    ids = torch.from_numpy(np.load(golden / "forward.npz")["full.input_ids"])
    data = np.load(golden / "forward_token_routing.npz")
    model = eager(golden / "model", mode="token")._model
    with torch.no_grad():
        out = model(ids, torch.arange(ids.shape[1])[None])
    np.testing.assert_allclose(out.logits.numpy(), data["full.logits"], atol=2e-4)
    for layer in range(2):
        _same_sets(out.expert_ids[layer].numpy(), data[f"full.layer{layer}.topk_idx"])


def test_exported_forward(golden, golden_bundle):
    data = np.load(golden / "forward.npz")
    ids = data["full.input_ids"]
    out = full_forward(cpu_session(golden_bundle.denoiser_path), ids, np.arange(ids.shape[1])[None], top_p=0.6,
                       min_experts=16)
    np.testing.assert_allclose(out["logits"], data["full.logits"], atol=2e-4)
    for layer in range(3):
        np.testing.assert_allclose(out[f"key.{layer}"], data[f"full.layer{layer}.key"], atol=2e-4)
        np.testing.assert_allclose(out[f"value.{layer}"], data[f"full.layer{layer}.value"], atol=2e-4)
    for layer in range(2):
        _same_sets(out["expert_ids"][layer], data[f"full.layer{layer}.topk_idx"])
    allowed = out["logits"].copy()
    allowed[..., 511] = -np.inf  # the mask id
    np.testing.assert_array_equal(out["token_ids"], allowed.argmax(-1))
    probs = np.exp(allowed - allowed.max(-1, keepdims=True))
    np.testing.assert_allclose(out["confidence"], (probs / probs.sum(-1, keepdims=True)).max(-1), atol=1e-6)


def test_exported_token_routing(golden, golden_token_bundle):
    ids = np.load(golden / "forward.npz")["full.input_ids"]
    data = np.load(golden / "forward_token_routing.npz")
    out = full_forward(cpu_session(golden_token_bundle.denoiser_path), ids, np.arange(ids.shape[1])[None])
    np.testing.assert_allclose(out["logits"], data["full.logits"], atol=2e-4)
    for layer in range(2):
        _same_sets(out["expert_ids"][layer], data[f"full.layer{layer}.topk_idx"])


def test_guard_of_all_experts_is_token_routing(golden, golden_bundle):
    ids = np.load(golden / "forward.npz")["full.input_ids"]
    data = np.load(golden / "forward_token_routing.npz")
    out = full_forward(cpu_session(golden_bundle.denoiser_path), ids, np.arange(ids.shape[1])[None], top_p=0.6,
                       min_experts=64)
    np.testing.assert_allclose(out["logits"], data["full.logits"], atol=2e-4)
