"""Bundles from before fused ops run, are checked and become networks of engines as they did."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from bundles import cpu_session, full_forward
from device_helpers import decode, host_backend
from older import older
from ort_ops_helpers import CPU, library

from dmoe_export.check.run import check_bundle
from dmoe_export.engine.network import prepare
from dmoe_export.engine.plugins import PluginLibrary
from dmoe_export.engine.settings import BuildSettings, resolved
from dmoe_export.runtime.backend import ForwardInputs
from dmoe_export.runtime.cpu.backend import OnnxRuntimeBackend
from dmoe_export.runtime.gpu.custom_ops import prepare_session
from dmoe_export.runtime.ort import ort

PROMPT = [5, 6, 7, 1, 9, 2, 4, 4, 3, 8]
OPTIONS = {"max_new_tokens": 40, "eos_id": -1}


@pytest.fixture(scope="module")
def tiny(tiny_bundle, tmp_path_factory):
    return older(tiny_bundle, tmp_path_factory.mktemp("older") / "b")


def test_it_is_one(tiny, tiny_bundle):
    names = {op.name for op in tiny.manifest.denoiser.ops}
    assert names == {"DmoeLinear", "DmoeAttention", "DmoeBlockRoute", "DmoeExperts"}
    assert not tiny.manifest.denoiser.keeps_logits and tiny_bundle.manifest.denoiser.keeps_logits


def test_answers_are_the_same(tiny, tiny_bundle):
    new, old = OnnxRuntimeBackend(tiny_bundle), OnnxRuntimeBackend(tiny)
    want = decode(new, [PROMPT], **OPTIONS)[0]
    assert decode(old, [PROMPT], **OPTIONS)[0] == decode(host_backend(tiny), [PROMPT], **OPTIONS)[0] == want
    assert old.kernels.sentence == new.kernels.sentence


def test_logits_of_all_places(tiny, tiny_bundle):
    ids = np.arange(12).reshape(1, 12)
    inputs = ForwardInputs(ids, ids, ids[:, :5], {}, want_logits=True)
    found = [backend.forward(inputs, backend.new_cache(1)) for backend in (
        OnnxRuntimeBackend(tiny_bundle), OnnxRuntimeBackend(tiny), host_backend(tiny_bundle), host_backend(tiny))]
    for out in found:
        assert out.logits.shape == (1, 5, tiny.manifest.model.vocab_size)
        np.testing.assert_allclose(out.logits, found[0].logits, atol=1e-5)


@pytest.mark.parametrize("reference", [True, False])
def test_the_check_knows_its_weights(tiny, tiny_checkpoint, reference):
    result = check_bundle(tiny.folder, tiny_checkpoint if reference else None, backends=["onnxruntime"])
    assert result.passed and (not reference or not result.weights.different)


def test_custom_ops_and_plugins(half_sample_bundle, tmp_path):
    bundle = older(half_sample_bundle, tmp_path / "b")
    layers = len(bundle.manifest.model.moe_layers)
    options = ort.SessionOptions()
    kernels = prepare_session(bundle, options, library())
    session = ort.InferenceSession(bundle.denoiser_path, options, providers=[CPU])
    assert kernels.kernels("DmoeBlockRoute") == kernels.kernels("DmoeExperts") == layers
    prompt = np.random.default_rng(1).integers(0, bundle.manifest.model.mask_id, (2, 40))
    positions = np.tile(np.arange(40), (2, 1))
    settings = {"top_p": 0.6, "min_experts": 4}
    got, want = (full_forward(s, prompt, positions, **settings)["logits"]
                 for s in (session, cpu_session(bundle.denoiser_path)))
    assert np.quantile(np.abs(got - want), 0.99) < 0.05
    network = prepare(bundle, resolved(BuildSettings(), bundle.manifest), PluginLibrary(Path("x"), "y"))
    assert network.plugin_nodes == 2 * layers
