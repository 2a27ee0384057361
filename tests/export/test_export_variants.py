"""Every routing mode and precision: exported graph against the eager model."""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx
import pytest
import torch
from bundles import cpu_session, full_forward

from dmoe_export import Generator, export_checkpoint
from dmoe_export.checkpoint.family import Checkpoint
from dmoe_export.description import RoutingDescription
from dmoe_export.export import trace
from dmoe_export.model.load import load_denoiser


def _eager(folder, mode, **changes):
    source = Checkpoint(folder, changes.pop("layers", None))
    routing = RoutingDescription.default(source.description.moe, mode, 8).model_copy(update=changes)
    model = load_denoiser(source, routing)
    ids = torch.arange(30).reshape(1, 30).repeat(2, 1) + torch.tensor([[0], [17]])
    with torch.no_grad():
        return ids.numpy(), model(ids, torch.arange(30).expand(2, 30))


@pytest.mark.parametrize(("mode", "settings"), [pytest.param("token", {}, marks=pytest.mark.slow),
                                                ("top_p", {"top_p": 0.3, "min_experts": 5}),
                                                ("top_c", {"coreset_size": 5})])
def test_modes_with_settings_changed_at_run_time(tiny_checkpoint, exported, mode, settings):
    bundle = exported(tiny_checkpoint, routing=mode, block_length=8)
    ids, want = _eager(tiny_checkpoint, mode, **settings)
    got = full_forward(cpu_session(bundle.denoiser_path), ids, np.arange(30)[None].repeat(2, 0), **settings)
    np.testing.assert_allclose(got["logits"], want.logits.numpy(), atol=2e-4)
    np.testing.assert_array_equal(got["expert_ids"][0], want.expert_ids[0].numpy())


def test_half_precision(golden, exported):
    """Against the float32 reference: cosine, norm ratio and the share of tokens with the same experts."""
    bundle = exported(golden / "model", precision="fp16", compute="fp16", min_experts=16)
    data = np.load(golden / "forward.npz")
    got = full_forward(cpu_session(bundle.denoiser_path), data["full.input_ids"], np.arange(96)[None], top_p=0.6,
                       min_experts=16)
    want, mine = data["full.logits"].ravel(), got["logits"].ravel()
    assert got["key.0"].dtype == np.float16 and got["logits"].dtype == np.float32
    assert np.dot(want, mine) / np.linalg.norm(want) / np.linalg.norm(mine) > 0.999
    assert np.linalg.norm(mine) / np.linalg.norm(want) == pytest.approx(1, abs=0.005)
    same = np.sort(got["expert_ids"][0], -1) == np.sort(data["full.layer0.topk_idx"], -1)
    assert same.all(-1).mean() > 0.9
    result = Generator.open(bundle.folder).generate([[5, 6, 7]], max_new_tokens=40, eos_id=-1)[0]
    assert len(result.token_ids) == 40


def test_first_layers(golden, exported):
    bundle = exported(golden / "model", layers=2)
    manifest = bundle.manifest
    assert (manifest.model.num_layers, manifest.checkpoint.layers_total) == (2, 3)
    model = load_denoiser(Checkpoint(golden / "model", 2), RoutingDescription.default(manifest.model.moe))
    ids = np.arange(64)[None]
    with torch.no_grad():
        want = model(torch.from_numpy(ids), torch.from_numpy(ids)).logits.numpy()
    got = full_forward(cpu_session(bundle.denoiser_path), ids, ids, top_p=0.6, min_experts=8)
    np.testing.assert_allclose(got["logits"], want, atol=2e-4)


@pytest.mark.slow
def test_a_shared_trace_is_the_trace(tiny_checkpoint, exported, tmp_path, monkeypatch):
    """The tests' exports may share one (conftest.py); tracing anew gives the same bytes."""
    options = {"precision": "int4", "dense_precision": "fp16", "compute": "fp16", "group_size": 32}
    assert isinstance(trace.torch_graph, partial)
    monkeypatch.setattr(trace, "torch_graph", trace.torch_graph.args[1])
    anew, shared = export_checkpoint(tiny_checkpoint, tmp_path / "b", **options), exported(tiny_checkpoint, **options)
    assert anew.manifest == shared.manifest
    assert anew.denoiser_path.read_bytes() == shared.denoiser_path.read_bytes()


def test_bodies_come_in_one_order(tiny_bundle):
    """Strings hash anew in every process: an order of a set would make other bytes of the same checkpoint."""
    names = [function.name for function in onnx.load(tiny_bundle.denoiser_path, load_external_data=False).functions]
    assert names == [f"Dmoe{name}" for name in ("AddNorm", "Head", "Linear", "Mixture", "Experts", "Router",
                                                "BlockRoute", "SelfAttention", "Attention")]
