"""Recorded forwards of a model with a canvas through every backend that runs here, and its engine's sizes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from canvas_helpers import feeds, grown, recorded_forwards, run_backend, same_experts
from device_helpers import host_backend
from tensorrt_helpers import Setup, bundle_with_engine

from dmoe_export.runtime.backend import CanvasInputs, ForwardInputs
from dmoe_export.runtime.cpu import library as cpu_ops
from dmoe_export.runtime.cpu.backend import OnnxRuntimeBackend
from dmoe_export.runtime.cpu.resident import open_resident
from dmoe_export.runtime.residency.budget import plan_budget

LENGTH, WINDOW = 32, 16  # of the recorded model


@pytest.fixture(scope="module")
def folder(golden):
    return golden.parent / "diffusion_gemma"


@pytest.fixture(scope="module")
def bundle(folder, exported):
    return exported(folder / "model")


def _same(name, got, want):
    np.testing.assert_allclose(got, want, atol=2e-4, err_msg=name)


def _inputs(d, rng, phases, tokens, positions, wanted):
    """A forward of rows [B]; soft embeddings where a canvas is denoised."""
    rows = len(phases)
    soft = rng.standard_normal((rows, tokens, d.hidden_size), np.float32) * phases[:, None, None]
    canvas = CanvasInputs(phases, soft, rng.uniform(0.4, 1, rows).astype(np.float32),
                          rng.random((rows, wanted.shape[1]), np.float32))
    return ForwardInputs(rng.integers(0, d.vocab_size, (rows, tokens)), positions, wanted, {}, want_logits=True,
                         want_keys_values=True, canvas=canvas)


def _everything(out, wanted):
    """What a forward gives, at the places that were wanted."""
    return {"token_ids": out.token_ids[wanted], "sampled_ids": out.canvas.sampled_ids[wanted],
            "logits": out.logits[wanted], "entropy": out.canvas.entropy[wanted],
            "soft_embeddings": out.canvas.soft_embeddings[wanted]}


def _prompted(backend, rng, lengths):
    """A cache whose rows have encoded so many tokens."""
    d, rows, most = backend.description, len(lengths), max(lengths)
    positions = np.broadcast_to(np.arange(most), (rows, most))
    given = positions < np.array(lengths)[:, None]
    inputs = _inputs(d, rng, np.zeros(rows, bool), most, np.where(given, positions, -1), np.full((rows, 1), -1))
    cache = backend.new_cache(rows)
    cache.commit(inputs, backend.forward(inputs, cache), given)
    return cache


def test_recorded_forwards_on_the_cpu(folder, bundle):
    backend = OnnxRuntimeBackend(bundle)
    recorded_forwards(folder, run_backend(backend), _same, same_experts)
    backend.close()


@pytest.mark.parametrize("lengths", [[WINDOW + 7, 3, 40], [5, 3, 9]], ids=["long", "short"])
@pytest.mark.parametrize("kind, graphs", [("onnxruntime", False), ("onnxruntime", True), ("tensorrt", True)])
def test_a_device_gives_what_the_host_gives(bundle, kind, graphs, lengths, monkeypatch, tmp_path):
    """Ragged prompts, some longer than the window, some than an engine's least forward (which pads them); rows of both
    phases; a later step, replayed; what is committed."""
    host = OnnxRuntimeBackend(bundle)
    device = (Setup(monkeypatch, bundle_with_engine(bundle, tmp_path / "b"), graphs, True).open() if kind == "tensorrt"
              else host_backend(bundle, graphs))
    phases = np.array([True, False, True])
    positions = np.array(lengths)[:, None] + np.arange(LENGTH)
    positions[1, 20:] = -1
    wanted = np.broadcast_to(np.arange(LENGTH), (3, LENGTH)).copy()
    wanted[1] = -1
    found = []
    for backend in (host, device):
        rng = np.random.default_rng(0)
        cache = _prompted(backend, rng, lengths)
        assert cache.token_bytes == 4 * backend.description.cached_values
        steps = [_inputs(backend.description, rng, phases, LENGTH, positions, wanted) for _ in range(4)]
        outs = [_everything(backend.forward(step, cache), wanted >= 0) for step in steps]
        out = backend.forward(steps[0], cache.part([0, 1, 2]))
        cache.commit(steps[0], out, (positions >= 0) & ~phases[:, None], [0, 1, 2])
        outs.append(_everything(backend.forward(steps[1], cache), wanted >= 0))
        found.append(outs)
    for mine, theirs in zip(*found, strict=True):
        for name, array in mine.items():
            if array.dtype == np.int64:
                np.testing.assert_array_equal(theirs[name], array, err_msg=name)
            else:
                np.testing.assert_allclose(theirs[name], array, atol=5e-4, err_msg=name)  # other sums
    assert not np.allclose(found[0][0]["logits"], found[0][4]["logits"], atol=1e-2)  # row 1 is read by none but itself
    if graphs:
        assert device.graphs.replayed >= 1
    host.close()
    device.close()


def test_rows_want_places_with_a_temperature_of_their_own(bundle):
    """On the CPU wanted places of other models move between rows; here each row has numbers of its own."""
    backend, rng = OnnxRuntimeBackend(bundle), np.random.default_rng(1)
    cache = _prompted(backend, rng, [5, 9, 12])
    positions = np.array([5, 9, 12])[:, None] + np.arange(LENGTH)
    wanted = np.full((3, LENGTH), -1)
    wanted[1] = np.arange(LENGTH)  # would be spread over all rows
    wanted[2, :4] = [3, 1, 0, 30]
    inputs = _inputs(backend.description, rng, np.ones(3, bool), LENGTH, positions, wanted)
    together = backend.forward(inputs, cache)
    for row in (1, 2):
        own = slice(row, row + 1)
        canvas = CanvasInputs(*(getattr(inputs.canvas, field.name)[own] for field in dataclasses.fields(CanvasInputs)))
        alone = backend.forward(ForwardInputs(inputs.input_ids[own], positions[own], wanted[own], {}, True, True,
                                              canvas=canvas), cache.part([row]))
        places = wanted[own] >= 0
        for name, array in _everything(alone, places).items():
            np.testing.assert_allclose(array, _everything_of(together, row, wanted)[name], atol=1e-4, err_msg=name)
    backend.close()


def _everything_of(out, row, wanted):
    places = np.zeros(wanted.shape, bool)
    places[row] = wanted[row] >= 0
    return _everything(out, places)


def test_an_expert_budget_changes_nothing(folder, bundle):
    """The same session over the same graph; where our kernels are missing there is no budget to keep."""
    if not cpu_ops.INSTALLED.is_file():
        pytest.skip("no CPU kernels are installed")
    free = OnnxRuntimeBackend(bundle, cpu_ops="on")
    tight = open_resident(bundle, plan_budget(bundle.manifest, bundle.manifest.bytes_per_expert * 3 * 4, None), 4)
    data = np.load(folder / "forward.npz")
    encode = feeds(data["encode.input_ids"], 0)
    outs = []
    for backend in (free, tight):
        run = run_backend(backend)
        text = grown(encode, run(encode))
        outs.append(run(feeds(data["denoise.input_ids"], 40, text, denoise=True,
                              soft=data["denoise1.soft_embeddings"])))
    for name, array in outs[0].items():
        np.testing.assert_array_equal(outs[1][name], array, err_msg=name)
    assert tight.statistics().misses > 0
    free.close()
    tight.close()


def test_a_canvas_without_its_inputs_is_refused(bundle):
    backend = OnnxRuntimeBackend(bundle)
    ids = np.zeros((1, 4), np.int64)
    with pytest.raises(AssertionError, match="canvas inputs are of models with a canvas"):
        backend.forward(ForwardInputs(ids, ids, np.full((1, 1), -1), {}), backend.new_cache(1))
    backend.close()
