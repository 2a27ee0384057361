"""The TensorRT backend's whole logic on a stand-in for TensorRT, whose names are compared with the real library's."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import fake_tensorrt
import numpy as np
import pytest
from device_helpers import decode
from fake_cudart import HostDevice
from fake_tensorrt import FakeTensorRT, weights_as_inputs

from dmoe_export import Generator
from dmoe_export.bundle.manifest import EngineEntry, FileEntry, ProfileEntry, WeightInput
from dmoe_export.bundle.reader import Bundle, hash_file, open_bundle
from dmoe_export.errors import BundleError, MissingRequirementError, RequestError
from dmoe_export.runtime import tensorrt as tensorrt_module
from dmoe_export.runtime import tensorrt_engine
from dmoe_export.runtime.backend import ForwardInputs
from dmoe_export.runtime.device import DeviceMemoryError
from dmoe_export.runtime.onnxruntime import OnnxRuntimeBackend
from dmoe_export.runtime.tensorrt import open_tensorrt

PROFILES = [ProfileEntry(name="prefill", batch=(1, 1, 4), tokens=(32, 96, 96), past=(1, 128, 600), rows=(1, 1, 32)),
            ProfileEntry(name="denoise", batch=(1, 1, 4), tokens=(32, 32, 32), past=(1, 256, 620), rows=(1, 32, 32))]
OPTIONS = {"max_new_tokens": 64, "threshold": 0.5, "steps": 8, "eos_id": 317}


@pytest.fixture(scope="module")
def engines(golden_bundle, tmp_path_factory):
    """A copy of the golden bundle with an engine whose experts are external."""
    folder = tmp_path_factory.mktemp("b") / "engines"
    shutil.copytree(golden_bundle.folder, folder)
    found = weights_as_inputs(folder / "denoiser.onnx", folder / "external.onnx", "experts.bin")
    assert len(found) == 2 * len(golden_bundle.manifest.model.moe_layers)
    (folder / "a.engine").write_text(json.dumps({
        "onnx": str(folder / "external.onnx"), "plugins": True, "profiles": [p.model_dump() for p in PROFILES]}))
    weights = [WeightInput(name=name, file="experts.bin", offset=offset, bytes=size, dtype="float32", shape=shape)
               for name, offset, size, shape in found]
    entry = EngineEntry(file="a.engine", flavour="tensorrt", version="11.4.0.0", targets=["sm86", "sm89"],
                        precision="fp32", experts="external", experts_op="plugin", profiles=PROFILES,
                        plugin_build="b1", plugin_nodes=4, fallback_nodes=0, weight_inputs=weights)
    return Bundle(folder, golden_bundle.manifest.model_copy(update={"engines": [entry]}))


@pytest.fixture(scope="module")
def cpu(golden_bundle):
    return OnnxRuntimeBackend(golden_bundle)


@pytest.fixture(scope="module")
def prompts(golden):
    data = np.load(golden / "generate.npz")
    return [data[f"{run}.prompt"][0].tolist() for run in range(4)]


def changed(bundle, **updates):
    """The bundle with another engine entry."""
    entry = bundle.manifest.engines[0].model_copy(update=updates)
    return Bundle(bundle.folder, bundle.manifest.model_copy(update={"engines": [entry]}))


class Setup:
    """A device, the module on it, and the backend."""

    def __init__(self, monkeypatch, bundle, graphs=True, rtx=False, **options):
        self.device = HostDevice(**options)
        self.trt = FakeTensorRT(self.device.fake, rtx=rtx)
        if rtx:
            bundle = changed(bundle, flavour="tensorrt-rtx")
            # The PyPI wheel: no module tensorrt_rtx, and the bindings one level down.
            wheel = SimpleNamespace(tensorrt_rtx_bindings=self.trt)
            monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
            monkeypatch.setitem(sys.modules, "tensorrt_rtx_bindings", wheel)
        else:
            monkeypatch.setitem(sys.modules, "tensorrt", self.trt)
        self.bundle, self.graphs = bundle, graphs

    def open(self):
        return open_tensorrt(self.bundle, self.device, self.graphs)


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
    assert (backend.limits.max_batch, backend.limits.max_tokens, backend.limits.max_context) == (4, 96, 620)
    _same(decode(backend, prompts, **OPTIONS), decode(cpu, prompts, **OPTIONS))
    for prompt in prompts[:2]:
        _same(decode(backend, [prompt], **OPTIONS), decode(cpu, [prompt], **OPTIONS))
    profiles = [context.profile for context in setup.trt.contexts]
    assert set(profiles) == {0, 1} and (graphs or len(profiles) == 2)
    assert (setup.device.fake.calls["cudaGraphLaunch"] > 5) == graphs
    if rtx:  # only contexts that are recorded wait for the kernels of their shapes
        kinds = [(c.profile, c.kernels.name) for c in setup.trt.contexts]
        assert kinds[:2].count((1, "LAZY")) <= 1 and all(k == "EAGER" for _, k in kinds[2:])


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
    for routing in ({}, {"top_p": 0.1, "min_experts": 2}):
        _same(decode(backend, prompts[:2], **OPTIONS, routing=routing),
              decode(cpu, prompts[:2], **OPTIONS, routing=routing))
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


REFUSED = [
    ({"version": "11.2.0.1"}, MissingRequirementError,
     "Engine a.engine was built with TensorRT 11.2.0.1, installed is TensorRT 11.4.0.0; install 11.2.0.1"),
    ({"targets": ["sm80", "sm120"]}, MissingRequirementError,
     r"Engine a.engine is for sm80, sm120, this machine has Host Memory \(sm89\); .* --targets sm89"),
    ({"file": "nowhere.engine"}, BundleError, "nowhere.engine cannot be read"),
    ({"precision": "fp16"}, BundleError, "has a tensor past_key.0 of type FLOAT, the bundle's graph has HALF there"),
]


@pytest.mark.parametrize(("updates", "kind", "sentence"), REFUSED, ids=[next(iter(r[0])) for r in REFUSED])
def test_engines_that_do_not_fit(monkeypatch, engines, updates, kind, sentence):
    with pytest.raises(kind, match=sentence) as caught:
        Setup(monkeypatch, changed(engines, **updates)).open()
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_flags_that_widen_what_fits(monkeypatch, engines):
    wide = changed(engines, version="11.2.0.1", targets=["sm80"], flags=["version-compatible", "hardware-compatible"])
    Setup(monkeypatch, wide).open()
    with pytest.raises(MissingRequirementError, match=r"\(sm75\)"):
        Setup(monkeypatch, wide, capability=(7, 5)).open()
    with pytest.raises(MissingRequirementError, match=r"built with TensorRT 10\.2"):
        Setup(monkeypatch, changed(wide, version="10.2")).open()


@pytest.mark.parametrize("rtx", [False, True])
@pytest.mark.parametrize("length", [0, 40])
def test_truncated_engine(monkeypatch, engines, rtx, length):
    name = f"cut{length}.engine"
    (engines.folder / name).write_bytes((engines.folder / "a.engine").read_bytes()[:length])
    sentence = f"{name} of 40 bytes cannot be opened by TensorRT" if length else f"{name} is empty"
    with pytest.raises(BundleError, match=sentence) as caught:
        Setup(monkeypatch, changed(engines, file=name), rtx=rtx).open()
    assert ("malformed engine" in str(caught.value)) == (rtx and length > 0)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


def test_a_machine_that_cannot_is_not_the_file_s_fault(monkeypatch, engines):
    setup = Setup(monkeypatch, engines)
    setup.trt.trouble = "[x.cpp::y::2] Error Code 1: Cuda Runtime (out of memory)"
    with pytest.raises(MissingRequirementError, match=r"on this machine \(.*out of memory\)\); update the NVIDIA"):
        setup.open()


def test_plugin_library_that_does_not_load(monkeypatch, engines):
    setup = Setup(monkeypatch, engines)
    setup.trt.plugins = False
    with pytest.raises(MissingRequirementError, match=r"needs the dmoe plugin library of build b1.*dmoe-export build"):
        setup.open()


def test_no_engine_no_library_no_driver(monkeypatch, engines, golden_bundle):
    with pytest.raises(MissingRequirementError, match="holds no engine; build one with: dmoe-export build"):
        open_tensorrt(golden_bundle)
    setup = Setup(monkeypatch, engines)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingRequirementError, match=r"TensorRT cannot be imported .*pip install 'dmoe-export.tensor"):
        setup.open()


def test_the_engine_that_came_farthest_is_named(monkeypatch, engines):
    entry = engines.manifest.engines[0]
    entries = [entry.model_copy(update={"targets": ["sm75"]}), entry.model_copy(update={"version": "9.9"}),
               entry.model_copy(update={"targets": ["sm80"]})]
    bundle = Bundle(engines.folder, engines.manifest.model_copy(update={"engines": entries}))
    with pytest.raises(MissingRequirementError, match=r"was built with TensorRT 9\.9"):
        Setup(monkeypatch, bundle).open()
    bundle = Bundle(engines.folder, engines.manifest.model_copy(update={"engines": [*entries, entry]}))
    assert Setup(monkeypatch, bundle).open().name == "tensorrt"


def test_weights_that_are_not_there(monkeypatch, engines):
    first, *rest = engines.manifest.engines[0].weight_inputs
    for updates, kind, sentence in (
            ({"offset": first.offset + 10**9}, BundleError, "weights reach to byte .* has .* bytes"),
            ({"file": "other.bin"}, BundleError, "is not listed in the manifest"),
            ({"bytes": first.bytes - 4}, BundleError, f"Weight {first.name} .* its shape"),
            ({"name": "unknown"}, BundleError, f"has a tensor {first.name} .* none of this name")):
        with pytest.raises(kind, match=sentence):
            Setup(monkeypatch, changed(engines, weight_inputs=[first.model_copy(update=updates), *rest])).open()
    extra = first.model_copy(update={"name": "extra"})
    with pytest.raises(BundleError, match="lacks the tensor extra"):
        Setup(monkeypatch, changed(engines, weight_inputs=[first, *rest, extra])).open()
    with pytest.raises(DeviceMemoryError, match=r"needs 0.0. GB for weights and scratch memory, Host Memory has 0.00"):
        Setup(monkeypatch, engines, memory=100_000).open()


def test_outputs_that_are_missing(monkeypatch, engines):
    content = json.loads((engines.folder / "a.engine").read_text())
    for without, fits in (("logits", True), ("expert_ids", False)):
        (engines.folder / "b.engine").write_text(json.dumps({**content, "without": [without]}))
        setup = Setup(monkeypatch, changed(engines, file="b.engine"))
        if fits:
            setup.open()
        else:
            with pytest.raises(BundleError, match="lacks the tensor expert_ids"):
                setup.open()


def test_through_the_generator(monkeypatch, engines, golden_bundle, prompts, tmp_path):
    """An engine listed in manifest.json, found by backend auto."""
    folder = tmp_path / "b"
    shutil.copytree(engines.folder, folder)
    engine = folder / "a.engine"
    files = [*engines.manifest.files, FileEntry(path="a.engine", size=engine.stat().st_size, sha256=hash_file(engine))]
    manifest = engines.manifest.model_copy(update={"files": files})
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    assert open_bundle(folder).manifest.engines[0].weight_inputs
    setup = Setup(monkeypatch, engines)
    monkeypatch.setattr(tensorrt_module.CudaDevice, "open", classmethod(lambda cls: setup.device))
    for name in ("auto", "tensorrt"):
        generator = Generator.open(folder, backend=name)
        assert generator.backend.name == "tensorrt"
        assert ("engine for this GPU" in generator.backend_choice) == (name == "auto")
    want = Generator.open(golden_bundle.folder, backend="onnxruntime").generate(prompts[:2], **OPTIONS)
    got = generator.generate(prompts[:2], **OPTIONS)
    assert [g.token_ids for g in got] == [w.token_ids for w in want]


CLASSES = {"engine": "ICudaEngine", "raw": "IExecutionContext", "runtime": "Runtime", "config": "IRuntimeConfig"}


def test_every_name_exists_in_tensorrt_rtx():
    trt = pytest.importorskip("tensorrt_rtx_bindings")
    trt = getattr(trt, "tensorrt_rtx_bindings", trt)
    source = "".join(Path(m.__file__).read_text() for m in (tensorrt_module, tensorrt_engine))
    used = set()
    for variable, kind in CLASSES.items():
        for name in re.findall(rf"\b{variable}\.(\w+)", source):
            assert hasattr(getattr(trt, kind), name), f"{kind}.{name}"
            used.add(name)
    for first, second in re.findall(r"\btrt\.([A-Z]\w+)(?:\.([A-Z_]+)\b)?", source):
        assert hasattr(getattr(trt, first), second or "__doc__"), f"{first}.{second}"
        used.add(first)
    assert {"set_tensor_address", "execute_async_v3", "deserialize_cuda_engine", "create_runtime_config", "ILogger",
            "set_device_memory", "get_tensor_location"} <= used
    assert hasattr(trt.IExecutionContext, "is_stream_capturable") and trt.DataType.BF16.itemsize == 2
    assert {"EAGER", "LAZY"} <= set(trt.DynamicShapesKernelSpecializationStrategy.__members__)
    for name in tensorrt_module._PRECISIONS.values():
        assert name in trt.DataType.__members__


def test_stand_in_has_the_real_names_and_arguments():
    trt = pytest.importorskip("tensorrt_rtx_bindings")
    trt = getattr(trt, "tensorrt_rtx_bindings", trt)
    for kind in ("Runtime", "ICudaEngine", "IExecutionContext", "IRuntimeConfig", "ILogger"):
        for name, function in inspect.getmembers(getattr(fake_tensorrt, kind), inspect.isfunction):
            if name.startswith("_"):
                continue
            signatures = re.findall(rf"{name}\(self: [^,)]*(.*?)\) ->", getattr(getattr(trt, kind), name).__doc__)
            assert len(inspect.signature(function).parameters) - 1 in {
                len(re.findall(r", \w+: ", signature)) for signature in signatures}, name
    for kind in ("TensorIOMode", "TensorLocation", "ExecutionContextAllocationStrategy", "DataType",
                 "DynamicShapesKernelSpecializationStrategy", "EngineInvalidityDiagnostics"):
        assert set(getattr(fake_tensorrt, kind).__members__) <= set(getattr(trt, kind).__members__)


def test_the_real_library_refuses_garbage_in_one_sentence(engines, monkeypatch):
    """As far as TensorRT-RTX goes without a GPU: our logger, its Runtime, its answer to a broken file."""
    trt = pytest.importorskip("tensorrt_rtx_bindings")
    trt = getattr(trt, "tensorrt_rtx_bindings", trt)
    bundle = changed(engines, flavour="tensorrt-rtx", version=trt.__version__)
    with pytest.raises(BundleError, match=r"a.engine of .* bytes cannot be opened by TensorRT-RTX 1\.\d.*malformed"):
        open_tensorrt(bundle, HostDevice())
