"""The parts of `check`: the streamed reference, rows of errors, near ties, runners on a device's cache."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from bundles import eager
from check_defects import tampered
from device_helpers import host_backend
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dmoe_export.check.compare import row_errors, tensor_error
from dmoe_export.check.feed import forward_inputs
from dmoe_export.check.gates import LIMITS, limits_for
from dmoe_export.check.generation import _near_tie
from dmoe_export.check.inputs import PROMPTS, make_inputs
from dmoe_export.check.instrument import open_layers
from dmoe_export.check.reference import Reference, named_outputs
from dmoe_export.check.runners import SequenceRunner
from dmoe_export.check.sources import BundleWeights, CheckpointWeights
from dmoe_export.checkpoint.family import Checkpoint
from dmoe_export.errors import BundleError, RequestError
from dmoe_export.runtime.backend import ForwardInputs, ForwardOutputs
from dmoe_export.runtime.cpu.backend import OnnxRuntimeBackend
from dmoe_export.text.codec import TextCodec

LONG = 1 << 30


def forwards(backend, feeds):
    cache = backend.new_cache(len(feeds[0].input_ids))
    for feed in feeds:
        inputs = forward_inputs(feed.arrays())
        out = backend.forward(inputs, cache)
        yield out
        cache.commit(inputs, out, feed.commit)


def test_fast_products_widen_what_is_in_sequence_alone():
    exact, fast = limits_for("fp32", None, None), limits_for("fp32", None, None, fast=True)
    assert exact == LIMITS["fp32"] and not fast.equal_tokens
    assert (fast.cosine, fast.norm, fast.atol) == (exact.cosine, exact.norm, exact.atol)  # layers alone run exactly
    assert fast.sequence_cosine == LIMITS["bf16"].sequence_cosine < exact.sequence_cosine


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("source", ["checkpoint", "bundle"])
def test_streamed_reference_is_the_eager_model(golden, golden_bundle, keep, source):
    checkpoint, routing = Checkpoint(golden / "model"), golden_bundle.manifest.routing
    weights = (CheckpointWeights(checkpoint) if source == "checkpoint"
               else BundleWeights(golden_bundle, golden_bundle.manifest.model))
    reference = Reference(weights, routing, keep)
    feeds = make_inputs(checkpoint.description, routing, None, [], 0, LONG).feeds
    whole = eager(golden / "model")
    for mine, theirs in zip(forwards(reference.backend, feeds), forwards(whole, feeds), strict=True):
        a, b = (named_outputs(out, checkpoint.description.moe_layers) for out in (mine, theirs))
        for name in b:
            np.testing.assert_allclose(a[name], b[name], atol=1e-5, err_msg=name)


def test_streams_add_up(golden, golden_bundle):
    checkpoint, routing = Checkpoint(golden / "model"), golden_bundle.manifest.routing
    reference = Reference(CheckpointWeights(checkpoint), routing, keep=False)
    feed = make_inputs(checkpoint.description, routing, None, [], 0, LONG).feeds[0].arrays()
    seen, _ = reference.forward(feed, reference.backend.new_cache(len(feed["input_ids"])))
    for layer in range(3):
        update = seen[f"attention.{layer}"] + seen[f"feed_forward.{layer}"]
        np.testing.assert_allclose(seen[f"stream.{layer}"] + update, seen[f"stream.{layer + 1}"], atol=1e-5)


def test_inputs_have_all_that_matters(golden_bundle):
    d, routing = golden_bundle.manifest.model, golden_bundle.manifest.routing
    one, same, other = (make_inputs(d, routing, None, [], seed, LONG) for seed in (0, 0, 1))
    prefill, denoise = one.feeds
    assert [feed.phase for feed in one.feeds] == ["prefill", "denoise"]
    lengths = (prefill.position_ids >= 0).sum(axis=1)
    assert len(set(lengths)) > 1 and lengths.max() >= 2 * routing.block_length  # ragged, and several blocks
    assert prefill.commit.sum() == lengths.sum() and not denoise.commit.any()
    assert (denoise.position_ids < 0).any() and (denoise.input_ids == d.mask_id).any()
    for i, row in enumerate(denoise.logit_rows):
        assert (denoise.input_ids[i, row[row >= 0]] == d.mask_id).all()
        assert denoise.position_ids[i, 0] == lengths[i]
    assert (denoise.input_ids == same.feeds[1].input_ids).all()
    assert (denoise.input_ids != other.feeds[1].input_ids).any()


@pytest.mark.parametrize("longest", [32, 33, 64, 100])
def test_inputs_fit_what_backends_take(golden_bundle, longest):
    feeds = make_inputs(golden_bundle.manifest.model, golden_bundle.manifest.routing, None, [], 0, longest).feeds
    assert max(int(feed.position_ids.max()) for feed in feeds) < longest
    assert len(feeds) == (1 if longest < 64 else 2)
    with pytest.raises(RequestError, match="fewer than a block"):
        make_inputs(golden_bundle.manifest.model, golden_bundle.manifest.routing, None, [], 0, 31)


def test_real_prompts_where_there_is_a_tokenizer(sample_bundle):
    text = TextCodec.of(sample_bundle)
    inputs = make_inputs(sample_bundle.manifest.model, sample_bundle.manifest.routing, text, ["what is 2 3?"], 0,
                         LONG)
    assert [prompt.text for prompt in inputs.prompts] == ["what is 2 3?", *PROMPTS]
    assert "what is 2 3?" in text.decode(inputs.feeds[0].input_ids[0].tolist())


@given(arrays(np.float32, (4, 6), elements=st.floats(0.5, 4, width=32)), st.floats(0.5, 2))
def test_scaling_changes_norm_and_not_cosine(a, factor):
    error = tensor_error([row_errors(a, a * np.float32(factor), LIMITS["fp32"])])
    assert error.cosine_worst == pytest.approx(1, abs=1e-6)
    assert error.norm_ratio_low == pytest.approx(factor, rel=1e-4) == error.norm_ratio_high
    assert error.rows == 4 and error.norm_ratio_mean == pytest.approx(factor, rel=1e-4)


def test_rows_that_are_zero_or_no_numbers():
    limits = LIMITS["fp32"]
    zero, one, bad = np.zeros((1, 3)), np.ones((1, 3)), np.full((1, 3), np.nan)
    assert row_errors(zero, zero, limits) and row_errors(one, one, limits)
    for expected, got in ((zero, one), (one, zero), (one, -one), (one, bad), (zero, bad), (one, bad + np.inf)):
        errors = row_errors(expected, got, limits)
        assert not errors
        assert tensor_error([errors]).model_dump_json().count("null") == 0  # all are numbers that JSON can say
    assert tensor_error([row_errors(zero[:0], zero[:0], limits)]).rows == 0


def _step(ids, token, confidence):
    inputs = ForwardInputs(np.array([ids]), np.array([[0, 1]]), np.array([[1]]), {})
    return inputs, ForwardOutputs(np.array([[token]]), np.array([[confidence]]), np.zeros((1, 1, 2, 1)), None, None)


@pytest.mark.parametrize(("confidence", "near"), [(0.5001, True), (0.6, False)])
def test_near_ties(confidence, near):
    same = _step([1, 9], 3, 0.9)
    assert _near_tie([same, _step([1, 3], 4, 0.5), _step([1, 4], 0, 1)],
                     [same, _step([1, 3], 5, confidence), _step([1, 5], 0, 1)], 1e-3) is near


@pytest.mark.parametrize("most", [None, 1, 3])
def test_a_device_cache_is_compared_like_a_host_one(tiny_bundle, most):
    """Rows go in groups as large as the backend takes, and keys come back from the device."""
    m = tiny_bundle.manifest
    feeds = [feed.arrays() for feed in make_inputs(m.model, m.routing, None, [], 0, LONG).feeds]
    device = host_backend(tiny_bundle)
    if most:
        device.limits = type("Some", (), {"max_batch": most, "max_context": None, "max_tokens": None})()
    results = []
    for backend in (OnnxRuntimeBackend(tiny_bundle), device):
        with SequenceRunner(backend, m.precision, feeds) as runner:
            results.append([runner.infer(feed) for feed in feeds])
    for host, other in zip(*results, strict=True):
        assert set(host) == set(other)
        valid = feeds[0]["position_ids"] >= 0 if host is results[0][0] else feeds[1]["position_ids"] >= 0
        for name in ("key.0", "value.1"):
            a, b = (x[name].swapaxes(1, 2)[valid] for x in (host, other))
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_strange_graph_is_refused(tiny_bundle, tmp_path):
    def rename(folder, manifest):
        model = onnx.load(folder / "denoiser.onnx", load_external_data=False)
        for owner in (*model.graph.initializer, *model.graph.node):
            if hasattr(owner, "input"):
                for i, name in enumerate(owner.input):
                    owner.input[i] = name.replace("layers.1.ffn_norm", "other")
            else:
                owner.name = owner.name.replace("layers.1.ffn_norm", "other")
        onnx.save(model, folder / "denoiser.onnx")

    bundle = tampered(tiny_bundle, tmp_path / "b", rename)
    with pytest.raises(BundleError, match=r"no node uses layers\.1\.ffn_norm\.weight"):
        open_layers(bundle, 2)
    with pytest.raises(BundleError, match="has no weight layers"):
        BundleWeights(bundle, bundle.manifest.model).dense("layers.1.ffn_norm.weight")
    assert torch.is_tensor(BundleWeights(bundle, bundle.manifest.model).dense("norm.weight"))
