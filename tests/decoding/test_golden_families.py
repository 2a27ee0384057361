"""Forwards of the full-canvas families against their references' recordings: eager, exported, half precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bundles import cpu_session, eager, full_forward

from dmoe_export.model.layers import rotary_angles
from dmoe_export.ops.self_attention.eager import rotate
from dmoe_export.runtime.backend import ForwardInputs
from dmoe_export.runtime.cpu.backend import OnnxRuntimeBackend

FAMILIES = ("llada_dense", "dream", "llada_moe")
_HALF = {"llada_dense": 0.15, "dream": 0.15, "llada_moe": 0.08}  # of logits between −18 and 18 (measured: half of it)


class Case:
    """A family's folder, recording and bundle."""

    def __init__(self, folder, bundle) -> None:
        self.folder, self.bundle = folder, bundle
        self.description = bundle.manifest.model
        self.data = np.load(folder / "forward.npz")
        self.ids = self.data["input_ids"]
        self.positions = np.broadcast_to(np.arange(self.ids.shape[1]), self.ids.shape).copy()

    def experts(self, layer):
        """The recorded expert ids of a layer as sorted sets [B, T, k]."""
        return np.sort(self.data[f"layer{layer}.topk_idx"].reshape(*self.ids.shape, -1), -1)


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, golden, exported):
    folder = golden.parent / request.param
    return Case(folder, exported(folder / "model"))


def _check_experts(case, ids):
    assert len(ids) == len(case.description.moe_layers)
    for layer, got in enumerate(ids):
        np.testing.assert_array_equal(np.sort(got, -1), case.experts(layer))


def test_eager_forward(case):
    model = eager(case.folder / "model", mode="token")._model
    with torch.no_grad():
        out = model(torch.from_numpy(case.ids), torch.from_numpy(case.positions))
    np.testing.assert_allclose(out.logits.numpy(), case.data["logits"], atol=2e-4)
    _check_experts(case, [ids.numpy() for ids in out.expert_ids])


def test_exported_forward(case):
    out = full_forward(cpu_session(case.bundle.denoiser_path), case.ids, case.positions)
    np.testing.assert_allclose(out["logits"], case.data["logits"], atol=2e-4)
    _check_experts(case, out.get("expert_ids", []))
    if "layer0.key" in case.data:  # the LLaDA reference records keys before rotary
        d = case.description
        angles = rotary_angles(torch.from_numpy(case.positions), d.rope_theta, d.rotary_dim, torch.float32)
        for layer in range(d.num_layers):
            recorded = torch.from_numpy(case.data[f"layer{layer}.key"]).transpose(1, 2)
            np.testing.assert_allclose(out[f"key.{layer}"], rotate(recorded, *angles).transpose(1, 2), atol=2e-4)
            np.testing.assert_allclose(out[f"value.{layer}"], case.data[f"layer{layer}.value"], atol=2e-4)


def test_half_precision(case, exported):
    bundle = exported(case.folder / "model", precision="fp16", compute="fp16")
    out = full_forward(cpu_session(bundle.denoiser_path), case.ids, case.positions)
    assert out["key.0"].dtype == np.float16 and np.abs(case.data["logits"]).max() > 3
    errors = np.abs(out["logits"] - case.data["logits"]).max(-1)  # [B, T]
    routed = [(np.sort(ids, -1) == case.experts(layer)).all(-1) for layer, ids in enumerate(out.get("expert_ids", []))]
    same = np.all(routed, axis=0) if routed else np.ones(errors.shape, bool)
    assert errors[same].max() < _HALF[case.folder.name]
    assert (~same).sum() <= 1 and errors.max() < 0.5  # a router's near-tie: layer 1, row 1, token 21 of llada_moe


def test_every_valid_key_is_seen_wherever_it_lies(case):
    """Cached keys on both sides, stale rows between them, padding among the tokens: the answer of the whole canvas."""
    session = cpu_session(case.bundle.denoiser_path)
    whole = full_forward(session, case.ids, case.positions)
    low, high = 20, 37
    order = np.r_[45:72, 0:low, high:45]  # any order; the positions say where a key belongs
    past = {"past_positions": np.broadcast_to(np.r_[[-1] * 3, order], (2, 3 + len(order))).copy()}
    rest = np.r_[72:case.ids.shape[1]]
    tokens = np.r_[low:high, rest]
    for part in ("key", "value"):
        for layer in range(case.description.num_layers):
            rows = whole[f"{part}.{layer}"][:, :, order]
            stale = np.full_like(rows[:, :, :3], 9.0)
            past[f"past_{part}.{layer}"] = np.concatenate([stale, rows], axis=2)
    ids = np.concatenate([case.ids[:, tokens], np.zeros((2, 2), np.int64)], axis=1)
    positions = np.concatenate([case.positions[:, tokens], np.full((2, 2), -1)], axis=1)
    out = full_forward(session, ids, positions, past)
    np.testing.assert_allclose(out["logits"][:, :len(tokens)], whole["logits"][:, tokens], atol=2e-4)


def test_backend_gives_rows_unshifted_and_experts_of_the_models_layers(case):
    backend = OnnxRuntimeBackend(case.bundle)
    rows = np.array([[5, -1], [0, 7]])
    out = backend.forward(ForwardInputs(case.ids, case.positions, rows, {}, want_logits=True), backend.new_cache(2))
    for i, j in ((0, 0), (1, 0), (1, 1)):
        np.testing.assert_allclose(out.logits[i, j], case.data["logits"][i, rows[i, j]], atol=2e-4)
    d = case.description
    assert out.expert_ids.dtype == np.int32
    assert out.expert_ids.shape == (len(d.moe_layers), *case.ids.shape, d.moe.experts_per_token if d.moe else 0)


def test_descriptions(golden):
    def describe(name):
        from dmoe_export.checkpoint.family import Checkpoint

        return Checkpoint(golden.parent / name / "model").description

    dense, dream, moe = map(describe, FAMILIES)
    assert (dense.family, dream.family, moe.family) == ("llada", "dream", "llada_moe")
    assert all(d.attention == "full" for d in (dense, dream, moe)) and dense.moe is dream.moe is None
    assert [d.logit_shift for d in (dense, dream, moe)] == [False, True, False]
    assert [d.qkv_bias for d in (dense, dream, moe)] == [False, True, False]
    assert moe.moe.score_function == "softmax" and not moe.moe.renormalise and not moe.moe.expert_bias
    assert (dense.mask_id, dense.eos_id, dream.pad_id) == (511, 510, 509)
