"""Predictions against what the code allocates: caches, slabs, widths of forwards; what changes them, and how."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import numpy as np
import pytest
from device_helpers import decode, host_backend

from dmoe_export.bench.workload import random_prompt
from dmoe_export.errors import RequestError
from dmoe_export.fit.gpu import _slab
from dmoe_export.fit.predict import COMPARED, predict
from dmoe_export.fit.work import work_of
from dmoe_export.generator import Generator
from dmoe_export.runtime.cache import HostCache, bucketed
from dmoe_export.runtime.gpu.salient import DeviceSalient
from dmoe_export.runtime.gpu.slab import Geometry, Slab

MIB = 1 << 20


def _part(prediction, name):
    return sum(part.bytes for part in prediction.parts if part.name == name)


def _cache(manifest, rows):
    return HostCache(rows, manifest.model.cached_heads, np.dtype(np.float32))


def test_the_cache_is_what_the_host_cache_holds(sample_bundle):
    manifest = sample_bundle.manifest
    told = predict(manifest, max_batch=3, max_context=300)
    cache = _cache(manifest, 3)
    cache._reserve(300)
    assert told.cache_bytes_per_token == cache.token_bytes
    assert _part(told, "cache") == sum(x.nbytes for x in (*cache.keys, *cache.values))


@pytest.mark.parametrize("rows, length", [(1, 1), (3, 128), (8, 480)])
def test_a_slab_is_as_large_as_the_device_cache_makes_it(sample_bundle, rows, length):
    class Room:
        def allocate(self, size):
            self.size = size
            return SimpleNamespace(address=0)

    d, room = sample_bundle.manifest.model, Room()
    Slab(room, Geometry.of_layers(d.cached_heads, 4), rows, length, 8 * rows * length)
    assert _slab(sample_bundle.manifest, rows, length) == room.size


@pytest.mark.parametrize("bundle, rows", [("salient_llada", 2), ("salient_block", 2), ("salient_block", 1)])
def test_states_of_salient_steps_on_a_gpu(request, monkeypatch, bundle, rows):
    """As many bytes as there are at most, of rows whose canvases fill the context."""
    bundle, context, live, most = request.getfixturevalue(bundle), 64, {}, 0
    manifest, new = bundle.manifest, DeviceSalient._new

    def counted(self, tokens):
        nonlocal most
        state = new(self, tokens)
        live[id(state)] = sum(slab.bytes for slab in state.slabs)
        weakref.finalize(state, live.pop, id(state))
        most = max(most, sum(live.values()))
        return state

    monkeypatch.setattr(DeviceSalient, "_new", counted)
    prompts = [[5, 9, 2 + row, *[7] * (context - 35)] for row in range(rows)]
    decode(host_backend(bundle), prompts, max_new_tokens=32, eos_id=-1, steps=8, salient_threshold=0.9)
    told = predict(manifest, backend="onnxruntime-cuda", max_batch=rows, max_context=context)
    states = _part(told, "states of salient steps")
    assert 0.6 * states < most <= states
    dense = next(file.size for file in manifest.files if file.path == "denoiser.onnx.data")
    assert _part(told, "dense weights of salient graphs") == len(manifest.salient.static) * dense
    assert not _part(predict(manifest, max_batch=rows, max_context=context), "states of salient steps")


@pytest.mark.parametrize("bundle, context", [("tiny_bundle", 96), ("tiny_bundle", 250), ("salient_llada", 60)])
def test_no_forward_is_wider_than_the_widest(request, bundle, context):
    """Of a batch that joins together, prompts of all the context but a block: block-causal, and full-canvas."""
    seen, rows = [], 3
    with Generator.open(request.getfixturevalue(bundle).folder, backend="onnxruntime") as generator:
        work = work_of(generator.bundle.manifest, rows, context)
        forward = generator.backend.forward

        def watched(inputs, cache):
            seen.append((*inputs.input_ids.shape, cache.positions.shape[1], inputs.logit_rows.shape[1]))
            return forward(inputs, cache)

        generator.backend.forward = watched
        batch = generator.batch(rows)
        for row in range(rows):
            new = work.block // 2
            prompt = random_prompt(generator.bundle, context - new, row)
            batch.add(generator.request(prompt, max_new_tokens=new, eos_id=-1, steps=2))
        while len(batch):
            assert not [event.error for event in batch.step() if event.error]
    assert max(shape[0] * shape[1] for shape in seen) == work.widest.tokens
    assert max(shape[3] for shape in seen) <= work.widest.wanted
    assert max(shape[2] for shape in seen) <= max(work.cached, work.widest.past)


def test_more_of_anything_takes_more(sample_bundle):
    manifest = sample_bundle.manifest
    base = predict(manifest, max_batch=2, max_context=200)
    row = predict(manifest, max_batch=3, max_context=200)
    assert row.host_bytes - base.host_bytes == base.bytes_per_row > 0
    assert predict(manifest, max_batch=2, max_context=400).host_bytes > base.host_bytes
    kept = predict(manifest, max_batch=2, max_context=200, prefix_cache="64M")
    assert kept.host_bytes - base.host_bytes == 64 * MIB == _part(kept, "prefix cache")
    served, generated = (predict(manifest, program=program).anonymous_bytes for program in ("serve", "generate"))
    assert served > generated


def test_a_budget_bounds_the_experts_and_nothing_else(sample_bundle):
    manifest = sample_bundle.manifest
    everything = manifest.bytes_per_expert * manifest.model.experts.num_experts * len(manifest.model.moe_layers)
    full, half = predict(manifest, max_context=64), predict(manifest, max_context=64, expert_budget="50%")
    assert _part(full, "experts") == everything and _part(half, "experts") == everything // 2
    assert full.host_bytes - half.host_bytes == everything - everything // 2
    assert full.anonymous_bytes == half.anonymous_bytes


def test_sizes_are_those_of_the_files(sample_bundle):
    manifest = sample_bundle.manifest
    told = predict(manifest, max_context=64)
    dense = next(file.size for file in manifest.files if file.path == f"{manifest.denoiser.file}.data")
    assert 0 < _part(told, "dense weights") <= dense


def test_what_was_compared_and_what_was_not_is_said(sample_bundle):
    manifest = sample_bundle.manifest
    assert predict(manifest, kernels=True).compared == COMPARED["onnxruntime"]
    bare = predict(manifest, kernels=False)
    assert bare.compared == COMPARED["kernels"] and _part(bare, "weights in float32")
    for backend in ("onnxruntime-cuda", "tensorrt"):
        told = predict(manifest, backend=backend)
        assert "never compared" in told.compared and told.device_bytes


def test_a_budget_on_a_gpu_keeps_all_experts_on_the_host(sample_bundle):
    told = predict(sample_bundle.manifest, backend="tensorrt", expert_budget="50%")
    full = predict(sample_bundle.manifest, backend="tensorrt")
    assert told.of("pinned") - full.of("pinned") == _part(full, "experts")
    assert told.device_bytes < full.device_bytes


@pytest.mark.parametrize("asked, said", [({"max_batch": 0}, "max_batch is 0"), ({"max_context": 0}, "max_context is 0"),
                                         ({"max_context": 10**9}, "positions for 1 to"),
                                         ({"expert_budget": "lots"}, "no size"),
                                         ({"prefix_cache": "-1G"}, "not positive")])
def test_sizes_that_make_no_sense_are_refused(sample_bundle, asked, said):
    with pytest.raises(RequestError, match=said):
        predict(sample_bundle.manifest, **asked)


def test_the_machine_meant_may_be_another_one(sample_bundle):
    """A cluster's pod is planned on a laptop."""
    manifest = sample_bundle.manifest
    with pytest.raises(RequestError, match="more than this machine's memory"):
        predict(manifest, expert_budget=1 << 20, machine_bytes=1 << 10)
    assert predict(manifest, expert_budget=1 << 40, machine_bytes=1 << 50).host_bytes
    assert bucketed(300) == 384  # what the cache above is made of


@pytest.mark.slow
def test_the_head_of_a_canvas(golden, exported):
    """On a CPU the table once more where it is stored in another type; on a GPU logits that stay in the graph."""
    folder = golden.parent / "diffusion_gemma" / "model"
    wide, narrow = exported(folder).manifest, exported(folder, precision="bf16").manifest
    d = wide.model
    assert not _part(predict(wide), "table of words, widened")
    for backend in ("onnxruntime", "onnxruntime-cuda"):
        assert _part(predict(narrow, backend=backend), "table of words, widened") == 4 * d.vocab_size * d.hidden_size
    told = predict(wide, backend="tensorrt", max_batch=3, max_context=256)
    assert _part(told, "logits") == 4 * 3 * d.vocab_size
    assert _part(told, "workspace") > 3 * 4 * 3 * d.canvas.length * d.vocab_size
