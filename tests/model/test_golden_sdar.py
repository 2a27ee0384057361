"""Forwards of SDAR, dense and with experts, against the reference's recordings: eager, exported, half precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bundles import cpu_session, eager, full_forward

BLOCK = 4
POSITIONS = np.broadcast_to(np.arange(48), (2, 48)).copy()


class Case:
    """A folder, its recording, its bundle."""

    def __init__(self, folder, exported) -> None:
        self.model = folder / "model"
        self.bundle = exported(self.model)
        self.data = np.load(folder / "forward.npz")

    def check(self, logits, keys, values, expert_ids):
        """float32: within 2e-4, the same experts."""
        np.testing.assert_allclose(logits, self.data["logits"], atol=2e-4)
        for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
            np.testing.assert_allclose(key, self.data[f"layer{layer}.key"], atol=2e-4)
            np.testing.assert_allclose(value, self.data[f"layer{layer}.value"], atol=2e-4)
        assert len(expert_ids) == (2 if "layer0.topk_idx" in self.data else 0)
        for layer, ids in enumerate(expert_ids):
            np.testing.assert_array_equal(np.sort(ids.reshape(96, -1)), np.sort(self.data[f"layer{layer}.topk_idx"]))


@pytest.fixture(scope="module", params=["sdar", "sdar_moe"])
def case(request, golden, exported):
    return Case(golden.parent / request.param, exported)


def of(out, part):
    return [out[f"{part}.{layer}"] for layer in range(2)]


def test_eager_forward(case):
    model = eager(case.model, mode="token", block_length=BLOCK)._model
    with torch.no_grad():
        out = model(torch.from_numpy(case.data["input_ids"]), torch.from_numpy(POSITIONS))
    case.check(out.logits.numpy(), [key.numpy() for key in out.keys], [value.numpy() for value in out.values],
               [ids.numpy() for ids in out.expert_ids])
    for layer, logits in enumerate(out.router_logits):
        np.testing.assert_allclose(logits.numpy().reshape(96, -1), case.data[f"layer{layer}.router_logits"], atol=2e-4)


def test_exported_forward(case):
    out = full_forward(cpu_session(case.bundle.denoiser_path), case.data["input_ids"], POSITIONS)
    case.check(out["logits"], of(out, "key"), of(out, "value"), out.get("expert_ids", []))


def test_blocks_after_a_cache_equal_the_whole(case):
    """Three blocks behind nine cached ones that lie in any order: the block-causal mask goes by positions alone."""
    session = cpu_session(case.bundle.denoiser_path)
    start = 36
    order = np.random.default_rng(0).permutation(start)
    past = {"past_positions": np.broadcast_to(order, (2, start)).copy()}
    for part in ("key", "value"):
        past |= {f"past_{part}.{layer}": case.data[f"layer{layer}.{part}"][:, :, order] for layer in range(2)}
    out = full_forward(session, case.data["input_ids"][:, start:], POSITIONS[:, start:], past)
    np.testing.assert_allclose(out["logits"], case.data["logits"][:, start:], atol=2e-4)


def test_half_precision(case, exported):
    bundle = exported(case.model, precision="fp16", compute="fp16")
    out = full_forward(cpu_session(bundle.denoiser_path), case.data["input_ids"], POSITIONS)
    want = case.data["logits"]
    assert out["key.0"].dtype == np.float16 and np.abs(want).max() > 20
    same = np.ones((2, 48), bool)
    for layer, ids in enumerate(out.get("expert_ids", [])):
        recorded = np.sort(case.data[f"layer{layer}.topk_idx"].reshape(2, 48, -1))
        same &= (np.sort(ids) == recorded).all(-1)
    errors = np.abs(out["logits"] - want).max(-1)
    assert (~same).sum() <= 1 and errors[same].max() < 0.1  # a router's near-tie may turn
    cosine = (out["logits"] * want).sum(-1) / np.linalg.norm(out["logits"], axis=-1) / np.linalg.norm(want, axis=-1)
    assert cosine[same].min() > 0.9999


def test_description(case):
    d, route = case.bundle.manifest.model, case.bundle.manifest.routing
    assert (d.num_heads * d.head_dim, d.hidden_size, d.rotary_dim) == (128, 64, 32)
    assert d.attention == "block_causal" and d.qk_norm and not d.qkv_bias and not d.logit_shift
    assert d.eos_ids == (318, 317) and d.mask_id == 319  # config.json has the first alone
    assert (route.mode, route.block_length) == ("token", BLOCK)
    if d.moe:
        assert d.moe.score_function == "softmax" and d.moe.renormalise and not d.moe.expert_bias
        assert (d.moe.shared_width, d.moe.num_groups, d.dense_width) == (0, 1, 0)
    assert case.bundle.manifest.decode_defaults == {}
    (warning,) = case.bundle.manifest.warnings[:1]
    assert "Qwen3's settings" in warning and "--temperature 0.6 --top-k 20 --top-p 0.95" in warning
