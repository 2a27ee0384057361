"""Generation through device memory equals generation on the host, token for token."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from bundles import GOLDEN_GUARD
from conftest import SAMPLE
from device_helpers import decode, host_backend

from dmoe_export import Generator
from dmoe_export.errors import RequestError
from dmoe_export.runtime.backend import ForwardInputs
from dmoe_export.runtime.cpu.backend import OnnxRuntimeBackend
from dmoe_export.runtime.gpu.device import DeviceError

QUESTIONS = [json.loads(line)["question"] for line in (SAMPLE / "held_out.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def cpu(golden_bundle):
    return OnnxRuntimeBackend(golden_bundle)


@pytest.fixture(scope="module")
def prompts(golden):
    data = np.load(golden / "generate.npz")
    return [data[f"{run}.prompt"][0].tolist() for run in range(6)]


def _same(got, want):
    assert got[0] == want[0]
    for mine, theirs in zip(got[1], want[1], strict=True):
        assert mine.finish_reason == theirs.finish_reason
        assert mine.statistics.forwards_by_phase == theirs.statistics.forwards_by_phase
        assert mine.statistics.unique_experts == pytest.approx(theirs.statistics.unique_experts)


@pytest.mark.parametrize("graphs", [False, True])
def test_batch_of_the_goldens(golden_bundle, cpu, prompts, graphs):
    backend = host_backend(golden_bundle, graphs)
    options = {"max_new_tokens": 96, "threshold": 0.5, "steps": 8, "eos_id": 317}
    _same(decode(backend, prompts, **options), decode(cpu, prompts, **options))
    for prompt in prompts[:2]:
        _same(decode(backend, [prompt], **options), decode(cpu, [prompt], **options))


@pytest.mark.parametrize("graphs", [False, True])
def test_the_sample_answers_the_same(sample_bundle, graphs):
    want = Generator.open(sample_bundle.folder, backend="onnxruntime")
    got = Generator(sample_bundle, host_backend(sample_bundle, graphs))
    for mine, theirs in zip(got.generate(QUESTIONS[:8], max_new_tokens=40),
                            want.generate(QUESTIONS[:8], max_new_tokens=40), strict=True):
        assert (mine.text, mine.token_ids, mine.finish_reason) == (theirs.text, theirs.token_ids, theirs.finish_reason)
    blocks = list(got.stream(QUESTIONS[0], max_new_tokens=70, eos_id=-1))
    whole = want.generate(QUESTIONS[0], max_new_tokens=70, eos_id=-1)[0]
    assert len(blocks) >= 3 and [i for b in blocks for i in b.token_ids] == whole.token_ids


def test_long_contexts_cross_buckets(sample_bundle):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(10, 60, n).tolist() for n in (400, 40, 130)]
    backend, cpu = host_backend(sample_bundle, True), OnnxRuntimeBackend(sample_bundle)
    options = {"max_new_tokens": 80, "eos_id": -1, "threshold": 0.3}
    _same(decode(backend, prompts, **options), decode(cpu, prompts, **options))
    assert {s.past for s in backend.executor.sizes} >= {1, 384, 512}
    assert {s.rows for s in backend.executor.sizes} <= {1, backend.routing.block_length}


def test_sampling_brings_logits_home(golden_bundle, cpu, prompts):
    options = {"max_new_tokens": 40, "temperature": 1.5, "seed": 3, "eos_id": -1}
    _same(decode(host_backend(golden_bundle, True), prompts[:3], **options), decode(cpu, prompts[:3], **options))


def test_half_precision(golden, exported, prompts):
    bundle = exported(golden / "model", precision="fp16", compute="fp16", min_experts=GOLDEN_GUARD)
    options = {"max_new_tokens": 40, "threshold": 0.5, "steps": 6, "eos_id": -1}
    plain = OnnxRuntimeBackend(bundle, cpu_ops="off")  # as the device's half does
    want = decode(plain, prompts[:3], **options)
    _same(decode(host_backend(bundle, True), prompts[:3], **options), want)


def test_every_output_and_setting(golden_bundle, cpu):
    """One forward, everything wanted: values, not only tokens; settings reach the graph."""
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 300, (2, 48))
    rows = np.stack([np.arange(0, 40), np.arange(8, 48)])
    rows[1, 30:] = -1
    backend = host_backend(golden_bundle)
    for routing in ({}, {"top_p": 0.2, "min_experts": 3}):
        inputs = ForwardInputs(ids, np.broadcast_to(np.arange(48), (2, 48)), rows, routing, True, True)
        cache = backend.new_cache(2)
        got, want = backend.forward(inputs, cache), cpu.forward(inputs, cpu.new_cache(2))
        valid = rows >= 0
        assert got.token_ids.shape == want.token_ids.shape == (2, 40)
        assert (got.token_ids == want.token_ids)[valid].all()
        assert np.allclose(got.confidence[valid], want.confidence[valid], atol=1e-6)
        assert np.allclose(got.logits[valid], want.logits[valid], atol=1e-4)
        assert (got.expert_ids == want.expert_ids).all()
        unique = len(np.unique(got.expert_ids))
    assert unique < golden_bundle.manifest.model.moe.num_experts


def test_steps_are_recorded_once_and_replayed(golden_bundle, cpu, prompts):
    backend = host_backend(golden_bundle, True)
    options = {"max_new_tokens": 64, "threshold": 0.99, "steps": 16, "eos_id": -1}
    decode(backend, prompts[:1], **options)
    assert 1 <= backend.graphs.recorded <= 4 and backend.graphs.replayed > 15
    decode(backend, prompts[:1], **options)
    last = max(era for era, _ in backend.graphs._entries)  # the first commit that rode was the widest forward so far
    keys, recorded, calls = ([key for key in backend.graphs._entries if key[0] == last], backend.graphs.recorded,
                             len(backend.executor.sizes))
    assert len(keys) == len({key[1][0] for key in keys})  # one graph a shape: addresses come back
    assert len(keys) <= recorded <= 2 * len(keys)  # what came before the widest forward is recorded anew
    tokens, _ = decode(backend, prompts[:1], **options)
    assert backend.graphs.recorded == recorded == backend.fake.calls["cudaGraphInstantiate"]
    assert len(backend.executor.sizes) == calls  # the executor was not needed any more
    assert tokens == decode(cpu, prompts[:1], **options)[0]


def test_a_larger_forward_ends_the_use_of_recorded_steps(golden_bundle, cpu, prompts):
    """ONNX Runtime may then have replaced memory that they read."""
    backend = host_backend(golden_bundle, True)
    options = {"max_new_tokens": 40, "threshold": 0.99, "steps": 16, "eos_id": -1}
    recorded = []
    for count in (1, 1, 1, 3, 1):
        tokens, _ = decode(backend, prompts[:count], **options)
        assert tokens == decode(cpu, prompts[:count], **options)[0]
        recorded.append(backend.graphs.recorded)
    assert recorded[1] == recorded[2] < recorded[3] < recorded[4]


def test_old_graphs_make_room(golden_bundle, prompts):
    backend = host_backend(golden_bundle, True)
    backend.graphs._limit = 2
    for count in (1, 2, 3, 1):
        got = decode(backend, prompts[:count], max_new_tokens=40, steps=8, threshold=0.99, eos_id=-1)
        want = decode(host_backend(golden_bundle), prompts[:count], max_new_tokens=40, steps=8, threshold=0.99,
                      eos_id=-1)
        _same(got, want)
    assert len(backend.graphs._entries) == 2
    assert backend.fake.calls["cudaGraphExecDestroy"] >= backend.graphs.recorded - 2 > 0


@pytest.mark.parametrize("trouble", ["executor", "driver", "launcher"])
def test_without_graphs_it_goes_on_and_says_so(golden_bundle, prompts, trouble, caplog, monkeypatch):
    backend = host_backend(golden_bundle, True, recordable=trouble != "executor")
    if trouble == "driver":
        def refuse(stream, host_reads):
            real_end(stream, host_reads)
            raise DeviceError("cudaStreamEndCapture failed on Host Memory.")

        real_end, backend._device.end_capture = backend._device.end_capture, refuse
    if trouble == "launcher":
        def lost(self, stream):
            if backend.fake.recording(stream):
                raise DeviceError("ONNX Runtime may not allocate now.")
            self._executor.execute(self._call, stream)

        monkeypatch.setattr("device_helpers._Launcher.__call__", lost)
    options = {"max_new_tokens": 40, "steps": 8, "threshold": 0.99, "eos_id": -1}
    _same(decode(backend, prompts[:2], **options), decode(host_backend(golden_bundle), prompts[:2], **options))
    said = {"executor": "cannot be recorded", "driver": "cudaStreamEndCapture failed", "launcher": "may not allocate"}
    assert said[trouble] in backend.graphs.off and backend.graphs.recorded == 0
    assert ("run without CUDA graphs" in caplog.text) == (trouble != "executor")


def test_requests_share_a_backend(golden_bundle, cpu, prompts):
    """Threads take turns; each has its cache."""
    backend = host_backend(golden_bundle, True)
    options = {"max_new_tokens": 48, "threshold": 0.5, "steps": 8, "eos_id": -1}
    with ThreadPoolExecutor(4) as threads:
        got = list(threads.map(lambda prompt: decode(backend, [prompt], **options), prompts))
    for mine, prompt in zip(got, prompts, strict=True):
        _same(mine, decode(cpu, [prompt], **options))


def test_a_step_is_two_copies_and_one_wait(golden_bundle, prompts):
    backend = host_backend(golden_bundle)
    counts = []
    forward = backend.forward

    def counted(inputs, cache):
        before = dict(backend.fake.calls)
        outputs = forward(inputs, cache)
        names = ("cudaMemcpyAsync", "cudaMemcpy3DAsync", "cudaStreamSynchronize", "cudaMalloc", "cudaHostAlloc")
        counts.append(tuple(backend.fake.calls[name] - before.get(name, 0) for name in names))
        return outputs

    backend.forward = counted
    decode(backend, prompts[:1], max_new_tokens=32, steps=16, threshold=0.99, eos_id=-1)
    assert counts.count((2, 0, 1, 0, 0)) > len(counts) // 2  # ids in, results out; nothing is allocated
    assert all(copies <= 3 and waits == 1 for copies, _, waits, _, _ in counts)


def test_memory_returns_after_a_request(golden_bundle, prompts):
    backend = host_backend(golden_bundle)
    used = []
    for _ in range(3):
        decode(backend, prompts[:3], max_new_tokens=40, eos_id=-1)
        used.append(backend.fake.used)
    assert used[1] == used[2]


@pytest.mark.parametrize("graphs", [False, True])
def test_closing_frees_the_device(golden_bundle, prompts, graphs):
    """All of it, also of a stream that is held and not at its end."""
    backend = host_backend(golden_bundle, graphs)
    generator = Generator(golden_bundle, backend)
    stream = generator.stream([prompts[0]], max_new_tokens=96, eos_id=-1)
    assert next(stream).token_ids and backend.fake.used and backend.fake.host
    assert not graphs or backend.graphs.recorded
    generator.close()
    generator.close()
    assert backend.fake.used == 0 and not backend.fake.blocks and not backend.fake.host
    with pytest.raises(RequestError, match="was closed"):
        next(stream)
    for call in (lambda: backend.new_cache(1), lambda: backend.forward(None, None)):
        with pytest.raises(RequestError, match=r"^Backend host was closed; open the bundle again\.$"):
            call()
