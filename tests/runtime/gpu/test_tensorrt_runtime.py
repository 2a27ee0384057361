"""The TensorRT backend's whole logic, from profiles to graphs, on a stand-in for TensorRT."""

from __future__ import annotations

import shutil

import linked_layouts
import numpy as np
import pytest
from device_helpers import decode
from tensorrt_helpers import PROFILES, Setup, bundle_with_engine, changed

from dmoe_export import Generator
from dmoe_export.bundle.manifest import FileEntry
from dmoe_export.bundle.reader import hash_file, open_bundle
from dmoe_export.bundle.seal import manifest_sha256
from dmoe_export.check.engines import check_engines
from dmoe_export.errors import MissingRequirementError, RequestError
from dmoe_export.runtime.backend import ForwardInputs
from dmoe_export.runtime.cpu.backend import OnnxRuntimeBackend
from dmoe_export.runtime.gpu import tensorrt as tensorrt_module

OPTIONS = {"max_new_tokens": 64, "threshold": 0.5, "steps": 8, "eos_id": 317}


@pytest.fixture(scope="module")
def engines(golden_bundle, tmp_path_factory):
    return bundle_with_engine(golden_bundle, tmp_path_factory.mktemp("b") / "engines")


@pytest.fixture(scope="module")
def cpu(golden_bundle):
    return OnnxRuntimeBackend(golden_bundle)


@pytest.fixture(scope="module")
def prompts(golden):
    data = np.load(golden / "generate.npz")
    return [data[f"{run}.prompt"][0].tolist() for run in range(4)]


def _same(got, want):
    assert got[0] == want[0]
    for mine, theirs in zip(got[1], want[1], strict=True):
        assert mine.statistics.forwards_by_phase == theirs.statistics.forwards_by_phase
        assert mine.statistics.unique_experts == pytest.approx(theirs.statistics.unique_experts)


@pytest.mark.parametrize("rtx", [False, True])
@pytest.mark.parametrize("graphs", [False, True])
def test_generation_equals_the_cpu(monkeypatch, engines, cpu, prompts, graphs, rtx):
    setup = Setup(monkeypatch, engines, graphs, rtx)
    backend = setup.open()
    limits = backend.limits
    assert (limits.max_batch, limits.max_tokens, limits.step_tokens, limits.max_context) == (4, 96, 64, 620)
    _same(decode(backend, prompts, **OPTIONS), decode(cpu, prompts, **OPTIONS))
    for prompt in prompts[:2]:
        _same(decode(backend, [prompt], **OPTIONS), decode(cpu, [prompt], **OPTIONS))
    profiles = [context.profile for context in setup.trt.contexts]
    assert set(profiles) == {0, 1} and (graphs or len(profiles) == 2)
    assert (setup.device.fake.calls["cudaGraphLaunch"] > 0) == graphs
    if rtx:  # only contexts that are recorded wait for the kernels of their shapes
        kinds = [(c.profile, c.kernels.name) for c in setup.trt.contexts]
        assert kinds[:2].count((1, "LAZY")) <= 1 and all(k == "EAGER" for _, k in kinds[2:])


def test_an_engine_whose_steps_take_one_block(monkeypatch, engines, cpu, prompts):
    """As all were before commits rode along: they run by themselves, what fits a prefill rides."""
    narrow = PROFILES[1].model_copy(update={"tokens": (32, 32, 32)})
    backend = Setup(monkeypatch, changed(engines, profiles=[PROFILES[0], narrow])).open()
    options = {**OPTIONS, "eos_id": -1}
    for prompt in prompts[:2]:
        got, want = decode(backend, [prompt], **options), decode(cpu, [prompt], **options)
        _same(got, want)
        assert got[1][0].statistics.executed_by_phase["commit"] == want[1][0].statistics.forwards_by_phase["commit"] > 0
        assert got[1][0].statistics.executed_by_phase["commit+denoise"] == 0


def test_long_prompts_go_in_chunks_the_engine_takes(monkeypatch, engines, cpu, prompts):
    """Chunks of 96 tokens over all buckets, up to a capacity that is no multiple of a bucket."""
    setup = Setup(monkeypatch, engines)
    backend = setup.open()
    prompt = (prompts[0] * 40)[:545]
    options = {**OPTIONS, "max_new_tokens": 70, "eos_id": -1}
    tokens, last = decode(backend, [prompt], **options)
    assert last[0].statistics.forwards_by_phase["prefill"] == 6
    assert {context._shapes["past_positions"][1] for context in setup.trt.contexts} >= {512, 620}
    assert tokens == decode(cpu, [prompt], **options)[0]


def test_recorded_calls_have_contexts_of_their_own(monkeypatch, engines, prompts):
    setup = Setup(monkeypatch, engines)
    backend = setup.open()
    decode(backend, prompts[:1], **{**OPTIONS, "threshold": 0.99, "steps": 16})
    assert backend.graphs.recorded == len(setup.trt.contexts) - len({c.profile for c in setup.trt.contexts})
    alone = setup.trt.contexts[-1]
    assert alone.runs == 2  # once for its results, once recorded


def test_rtx_that_cannot_record_yet_is_asked_again(monkeypatch, engines, cpu, prompts):
    setup = Setup(monkeypatch, engines, rtx=True)
    setup.trt.capturable = False
    backend = setup.open()
    options = {**OPTIONS, "threshold": 0.99, "steps": 16}
    _same(decode(backend, prompts[:1], **options), decode(cpu, prompts[:1], **options))
    assert backend.graphs.recorded == 0 and not backend.graphs.off
    setup.trt.capturable = True
    _same(decode(backend, prompts[:1], **options), decode(cpu, prompts[:1], **options))
    assert backend.graphs.recorded > 0


def test_inputs_that_the_host_reads(monkeypatch, engines, cpu, prompts):
    """A setting that TensorRT wants in host memory is given there, and nothing is recorded."""
    setup = Setup(monkeypatch, engines)
    setup.trt.host_inputs = ("min_experts", "top_p")
    backend = setup.open()
    for routing in ({}, {"coreset_top_p": 0.1, "min_experts": 2}):
        _same(decode(backend, prompts[:2], **OPTIONS, **routing),
              decode(cpu, prompts[:2], **OPTIONS, **routing))
    assert backend.graphs.recorded == 0 and backend.graphs.off


def test_experts_in_a_loop_are_not_recorded(monkeypatch, engines, cpu, prompts):
    backend = Setup(monkeypatch, changed(engines, experts_op="onnx")).open()
    _same(decode(backend, prompts[:2], **OPTIONS), decode(cpu, prompts[:2], **OPTIONS))
    assert backend.graphs.recorded == 0 and backend.graphs.off


def test_short_forwards_are_padded_up_to_the_profile(monkeypatch, engines, cpu):
    """20 tokens on an engine whose profiles start at 32; wanted rows stay theirs, and the cache gets 20 tokens."""
    backend = Setup(monkeypatch, engines).open()
    ids = np.random.default_rng(0).integers(3, 300, (2, 20))
    inputs = ForwardInputs(ids, np.broadcast_to(np.arange(20), (2, 20)), np.array([[0, 7, 19]] * 2), {}, True, True)
    mine, theirs = backend.new_cache(2), cpu.new_cache(2)
    for _ in range(2):
        got, want = backend.forward(inputs, mine), cpu.forward(inputs, theirs)
        assert got.expert_ids.shape == want.expert_ids.shape and (got.expert_ids == want.expert_ids).all()
        assert (got.token_ids == want.token_ids).all() and np.allclose(got.logits, want.logits, atol=1e-4)
        mine.commit(inputs, got, np.ones((2, 20), bool))
        theirs.commit(inputs, want, np.ones((2, 20), bool))
        inputs = ForwardInputs(ids, inputs.position_ids + 20, inputs.logit_rows, {}, True, True)


@pytest.mark.parametrize(("sizes", "sentence"), [
    ((5, 32, 1), "5 rows are more than engine a.engine was built for .4.; .* --max-batch 5"),
    ((1, 97, 1), "97 tokens in one forward .*96.* --max-prefill 97"),
    ((1, 32, 33), "33 vocabulary rows"), ((1, 96, 32), None)])
def test_limits(monkeypatch, engines, sizes, sentence):
    backend = Setup(monkeypatch, engines).open()
    batch, tokens, rows = sizes
    inputs = ForwardInputs(np.zeros((batch, tokens), np.int64), np.zeros((batch, tokens), np.int64),
                           np.zeros((batch, rows), np.int64), {})
    if sentence is None:
        assert backend.forward(inputs, backend.new_cache(batch)).token_ids.shape == (batch, rows)
        return
    with pytest.raises(RequestError, match=sentence):
        backend.forward(inputs, backend.new_cache(batch))


def test_generator_names_the_limits(monkeypatch, engines):
    generator = Generator(engines, Setup(monkeypatch, engines).open())
    with pytest.raises(RequestError, match=r"5 prompts at once .*--max-batch 5"):
        generator.generate([[5]] * 5)
    with pytest.raises(RequestError, match=r"Prompt 0 of 600 tokens and 128 new .* 728 tokens, .* 620; .*728"):
        generator.generate([[5] * 600])


def test_weights_arrive_and_stay(monkeypatch, engines):
    setup = Setup(monkeypatch, engines)
    backend = setup.open()
    entry = engines.manifest.engines[0]
    data = np.fromfile(engines.folder / "experts.bin", np.uint8)
    executor = backend._executor
    for weight in entry.weight_inputs:
        buffer, shape = executor._weights[weight.name]
        assert list(shape) == weight.shape
        got = setup.device.fake.view(buffer.address, weight.bytes)
        assert (got == data[weight.offset:weight.offset + weight.bytes]).all()
    assert setup.device.fake.calls["cudaMemcpyAsync"] == len(entry.weight_inputs)  # each small enough for one chunk


@pytest.fixture
def listed(engines, tmp_path):
    """A bundle whose manifest lists its engine among the files."""
    folder = tmp_path / "b"
    shutil.copytree(engines.folder, folder)
    engine = folder / "a.engine"
    files = [*engines.manifest.files, FileEntry(path="a.engine", size=engine.stat().st_size, sha256=hash_file(engine))]
    manifest = engines.manifest.model_copy(update={"files": files})
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    assert open_bundle(folder).manifest.engines[0].weight_inputs
    return folder


def test_through_the_generator(monkeypatch, engines, listed, golden_bundle, prompts):
    """An engine listed in manifest.json, found by backend auto."""
    setup = Setup(monkeypatch, engines)
    monkeypatch.setattr(tensorrt_module.CudaDevice, "open", classmethod(lambda cls: setup.device))
    for name in ("auto", "tensorrt"):
        generator = Generator.open(listed, backend=name)
        assert generator.backend.name == "tensorrt"
        assert ("engine for this GPU" in generator.backend_choice) == (name == "auto")
    want = Generator.open(golden_bundle.folder, backend="onnxruntime").generate(prompts[:2], **OPTIONS)
    got = generator.generate(prompts[:2], **OPTIONS)
    assert [g.token_ids for g in got] == [w.token_ids for w in want]


def test_a_hub_s_engine_runs_only_for_who_vouches_for_it(monkeypatch, engines, listed, tmp_path):
    """It brings native code, and a hub's cache is full of other people's."""
    setup, folder = Setup(monkeypatch, engines), linked_layouts.hub(listed, tmp_path)
    monkeypatch.setattr(tensorrt_module.CudaDevice, "open", classmethod(lambda cls: setup.device))
    assert Generator.open(folder, expect_sha256=manifest_sha256(folder)).backend.name == "tensorrt"
    made: list[int] = []
    monkeypatch.setattr(tensorrt_module, "deserialise", lambda *_: made.append(1))
    auto = Generator.open(folder)
    assert auto.backend.name == "onnxruntime" and "only for a bundle that you vouch for" in auto.backend_choice
    with pytest.raises(MissingRequirementError, match=r"native code from a hub.*--expect-sha256 or --trusted-key"):
        Generator.open(folder, backend="tensorrt")
    [checked] = check_engines(open_bundle(folder), setup.device)
    without_links = shutil.copytree(folder, tmp_path / "models--org--c" / "snapshots" / "abc")  # links become files
    assert not open_bundle(without_links).vouched and open_bundle(listed).vouched
    assert not made and any("vouch" in finding.detail for finding in checked.findings)
