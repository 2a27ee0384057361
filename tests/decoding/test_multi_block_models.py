"""Multi-block editing on models: what open blocks see, in the eager model, in bundles, on a device, in engines."""

from __future__ import annotations

import numpy as np
import pytest
import tensorrt_helpers
from bundles import GOLDEN_GUARD, eager
from device_helpers import host_backend
from tensorrt_helpers import Setup
from toy_backend import decode

from dmoe_export import export_checkpoint
from dmoe_export.engine.settings import BuildSettings, profiles, resolved
from dmoe_export.errors import InputError, RequestError
from dmoe_export.runtime.backend import ForwardInputs
from dmoe_export.runtime.cpu.backend import OnnxRuntimeBackend

OPTIONS = {"max_new_tokens": 120, "threshold": 0.05, "edit_threshold": 0.02, "edit_passes": 2, "steps": 4,
           "eos_id": -1}
PROMPTS = [np.random.default_rng(length).integers(3, 300, length).tolist() for length in (45, 40, 2)]


@pytest.fixture(scope="module")
def bundle(golden, exported):
    return exported(golden / "model", min_experts=GOLDEN_GUARD, multi_block_editing=True)


def _inputs(ids, start, seen_at=None, want=None):
    """A forward of ids at positions from `start` on; `seen_at`: where they stand for the mask."""
    places = np.arange(len(ids))
    wanted = places if want is None else np.asarray(want)
    return ForwardInputs(ids[None], (start + places)[None], wanted[None], {}, True, True,
                         attention_positions=None if seen_at is None else np.asarray(seen_at)[None])


def _random(d, count, seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, d.mask_id, count)
    ids[rng.random(count) < 0.4] = d.mask_id
    return ids


def test_two_open_blocks_are_a_block_of_twice_the_length(golden):
    """By a model of that block length over the same text; its routing does not group tokens."""
    narrow, wide = (eager(golden / "model", "token", block_length=n) for n in (32, 64))
    ids = _random(narrow.description, 192)
    seen_at = np.repeat([63, 127, 191], 64)
    got = narrow.forward(_inputs(ids, 0, seen_at), narrow.new_cache(1))
    want = wide.forward(_inputs(ids, 0), wide.new_cache(1))
    np.testing.assert_allclose(got.logits, want.logits, atol=2e-5)
    assert (got.expert_ids == want.expert_ids).all()
    plain = narrow.forward(_inputs(ids, 0), narrow.new_cache(1))
    assert abs(got.logits - plain.logits).max() > 0.01


@pytest.fixture(scope="module")
def model(golden):
    return eager(golden / "model")


@pytest.fixture(params=["kernels", "bodies", "device"])
def backend(request, bundle):
    if request.param == "device":
        return host_backend(bundle, True)
    return OnnxRuntimeBackend(bundle, 1, cpu_ops="on" if request.param == "kernels" else "off")


def test_a_bundle_opens_blocks_as_the_model_does(model, backend, golden_bundle):
    """Behind a cached block: one that rides, two that are open. Its own graph and one without the input agree, too."""
    plain = OnnxRuntimeBackend(golden_bundle, 1, cpu_ops="off")
    n = model.routing.block_length
    ids = _random(model.description, 4 * n, 1)
    found = []
    for one, seen_at in ((model, True), (backend, True), (backend, False), (plain, False)):
        cache = one.new_cache(1)
        first = _inputs(ids[:n], 0, want=[-1])
        cache.commit(first, one.forward(first, cache), np.ones((1, n), bool))
        at = np.append(np.arange(n, 2 * n), np.full(2 * n, 4 * n - 1)) if seen_at else None
        found.append(one.forward(_inputs(ids[n:], n, at), cache))
    for mine, theirs in (found[:2], found[2:]):
        np.testing.assert_allclose(mine.logits, theirs.logits, atol=2e-4)
        assert (mine.token_ids == theirs.token_ids).all()
    assert (found[0].expert_ids == found[1].expert_ids).all()
    assert abs(found[1].logits - found[2].logits)[0, n:2 * n].max() > 0.01  # the open block sees the next
    np.testing.assert_allclose(found[1].logits[0, :n], found[2].logits[0, :n], atol=2e-4)  # what rides does not


@pytest.mark.parametrize("edit_blocks", [1, 3])
def test_answers_are_the_eager_models(model, backend, edit_blocks):
    want = decode(model, PROMPTS, edit_blocks=edit_blocks, cache="none", **OPTIONS)
    got = decode(backend, PROMPTS, edit_blocks=edit_blocks, **OPTIONS)
    assert got[0] == want[0] and [len(tokens) for tokens in got[0]] == [120] * 3
    for mine, theirs in zip(got[1], want[1], strict=True):
        assert mine.statistics.edits == theirs.statistics.edits > 0
    assert want[0] != decode(backend, PROMPTS, **OPTIONS)[0]


@pytest.mark.parametrize("graphs", [False, True])
def test_an_engine_answers_the_same(monkeypatch, bundle, model, tmp_path, graphs):
    """Two open blocks in the profile of steps, what rides and three or more in that of prefills; all rows predicted."""
    asked = BuildSettings(max_batch=4, max_prefill=128, max_context=500, experts_op="onnx")
    ours = profiles(resolved(asked, bundle.manifest), bundle.manifest, bundle.manifest.denoiser)
    assert [(p.tokens[2], p.rows[2]) for p in ours] == [(128, 128), (64, 64)]
    monkeypatch.setattr(tensorrt_helpers, "PROFILES", list(ours))
    setup = Setup(monkeypatch, tensorrt_helpers.bundle_with_engine(bundle, tmp_path / "b"), graphs)
    backend = setup.open()
    for edit_blocks in (1, 3):  # with a penalty logits are wanted, not the kernel that ranks them
        options = {**OPTIONS, "edit_blocks": edit_blocks, "penalty_lambda": 0.5}
        want, got = decode(model, PROMPTS, **options), decode(backend, PROMPTS, **options)
        assert got[0] == want[0] and [one.statistics.edits for one in got[1]] == [
            one.statistics.edits for one in want[1]]
    assert {context.profile for context in setup.trt.contexts} == {0, 1}
    assert (setup.device.fake.calls["cudaGraphLaunch"] > 0) == graphs


def test_what_cannot_open_blocks_says_so(golden_bundle, synthetic, tmp_path):
    with pytest.raises(RequestError, match=r"edit_blocks needs a graph in which blocks can see one another, and that "
                                           r"of BUNDLE is none; export it again with --multi-block-editing"):
        decode(OnnxRuntimeBackend(golden_bundle), PROMPTS, edit_blocks=1, **OPTIONS)
    for geometry, attention in (("llada-tiny", "full"), ("diffusion-gemma-tiny", "canvas")):
        with pytest.raises(InputError, match=f"{attention} attention; leave --multi-block-editing out"):
            export_checkpoint(synthetic(geometry), tmp_path / "b", multi_block_editing=True)


def test_the_manifest_says_it(bundle, golden_bundle):
    manifest, plain = bundle.manifest, golden_bundle.manifest
    assert manifest.denoiser.opens_blocks and not plain.denoiser.opens_blocks
    assert manifest.denoiser.inputs[:-1] == plain.denoiser.inputs
    assert manifest.denoiser.inputs[-1].model_dump() == {
        "name": "attention_positions", "dtype": "int64", "shape": ["B", "T"]}
    assert manifest.denoiser.ops == plain.denoiser.ops
