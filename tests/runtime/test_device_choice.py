"""Which backend is taken and why; ONNX Runtime's CUDA provider as far as it can be held to its word without a GPU."""

from __future__ import annotations

import json
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest
from click.testing import CliRunner
from device_helpers import decode
from fake_cudart import FakeCudart

from dmoe_export import Generator
from dmoe_export.bundle.reader import Bundle
from dmoe_export.cli import main
from dmoe_export.errors import BundleError, MissingRequirementError, RequestError
from dmoe_export.runtime import choose
from dmoe_export.runtime.backend import Limits
from dmoe_export.runtime.cpu.backend import OnnxRuntimeBackend
from dmoe_export.runtime.gpu import onnxruntime as onnxruntime_cuda
from dmoe_export.runtime.gpu.device import CudaDevice

PROVIDER = onnxruntime_cuda.PROVIDER


class CudaSession:
    """A session of the CPU provider that claims to be the CUDA provider's, and keeps its stream's order."""

    cudart: FakeCudart
    provider, changed, elsewhere = PROVIDER, {}, ()

    def __init__(self, path, settings, providers, enable_fallback):
        ((name, self._options),) = providers
        assert name == PROVIDER
        self._real = ort.InferenceSession(path, settings, providers=["CPUExecutionProvider"])

    def __getattr__(self, name):
        return getattr(self._real, name)

    def get_providers(self):
        return [self.provider, "CPUExecutionProvider"]

    def get_provider_options(self):
        return {PROVIDER: {**self._options, "device_id": "0", **self.changed}}

    def get_provider_graph_assignment_info(self):
        return [SimpleNamespace(ep_name="CPUExecutionProvider" if node.op_type in self.elsewhere else PROVIDER,
                                get_nodes=lambda node=node: [node])
                for part in self._real.get_provider_graph_assignment_info() for node in part.get_nodes()]

    def io_binding(self):
        binding = self._real.io_binding()
        for name in ("bind_input", "bind_output"):
            setattr(binding, name, partial(self._bind, getattr(binding, name)))
        return binding

    def _bind(self, real, tensor, kind, index, *rest):
        assert (kind, index) == ("cuda", 0)
        real(tensor, "cpu", 0, *rest)

    def run_with_iobinding(self, binding, options):
        assert options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
        stream = int(self._options["user_compute_stream"])
        self.cudart.enqueue(stream, lambda: self._real.run_with_iobinding(binding))


@pytest.fixture
def cuda(monkeypatch):
    """A machine with a GPU and the provider; the class of its sessions."""
    cudart = FakeCudart()
    session = type("Session", (CudaSession,), {"cudart": cudart})
    monkeypatch.setattr(CudaDevice, "open", classmethod(lambda cls: cls(cudart)))
    monkeypatch.setattr(onnxruntime_cuda, "has_provider", lambda: True)
    monkeypatch.setattr(choose, "has_provider", lambda: True)
    monkeypatch.setattr(onnxruntime_cuda, "ort", SimpleNamespace(
        InferenceSession=session, SessionOptions=ort.SessionOptions, RunOptions=ort.RunOptions, __version__="1.0",
        set_default_logger_severity=lambda level: None))
    return session


@pytest.fixture
def no_driver(monkeypatch):
    monkeypatch.setattr(CudaDevice, "open", classmethod(lambda cls: cls(FakeCudart(driver=0))))


def test_the_cuda_provider_generates_the_same(cuda, golden, golden_bundle):
    data = np.load(golden / "generate.npz")
    prompts = [data[f"{run}.prompt"][0].tolist() for run in range(4)]
    generator = Generator.open(golden_bundle.folder)
    assert generator.backend.name == "onnxruntime-cuda" and generator.backend.placement.keys() == {PROVIDER}
    assert generator.backend_choice == ("the bundle holds no engine; the CUDA provider runs here; norms, vocabulary "
                                        "head, experts, routing and attention on ONNX Runtime's own ops (the custom "
                                        "ops have no fp32 kernels)")
    options = {"max_new_tokens": 48, "threshold": 0.99, "steps": 8, "eos_id": 317}
    for batch in (prompts, prompts[:1]):
        assert decode(generator.backend, batch, **options)[0] == decode(
            OnnxRuntimeBackend(golden_bundle), batch, **options)[0]
    assert generator.backend.graphs.replayed and not generator.backend.graphs.off
    again = Generator.open(golden_bundle.folder, backend="onnxruntime-cuda")
    assert again.backend_choice.startswith("as asked for; norms, vocabulary head, experts, ")


@pytest.mark.parametrize(("what", "value", "sentence"), [
    ("provider", "CPUExecutionProvider", "could not start CUDAExecutionProvider and would run on CPUExecutionProvider"),
    ("changed", {"user_compute_stream": "0"}, r"did not take the option user_compute_stream=1000 .*has '0'"),
    ("elsewhere", ("MoE",), r"no kernel for MoE in this precision and would run \d+ nodes on the CPU"),
    ("elsewhere", ("Transpose", "Reshape"), "no kernel for Transpose in this precision"),
    ("elsewhere", ("Mul", "Add", "Reshape"), "no kernel for Add, Mul, Reshape in")])
def test_a_session_that_is_not_what_was_asked_for(cuda, golden_bundle, what, value, sentence):
    setattr(cuda, what, value)
    with pytest.raises(MissingRequirementError, match=sentence) as caught:
        Generator.open(golden_bundle.folder, backend="onnxruntime-cuda")
    assert caught.value.exit_code == 3
    generator = Generator.open(golden_bundle.folder)  # auto goes on, and says why
    assert generator.backend.name == "onnxruntime"
    assert generator.backend_choice.startswith("the bundle holds no engine; ")
    assert str(caught.value)[:40] in generator.backend_choice


def test_shapes_may_be_computed_on_the_cpu(cuda, golden_bundle):
    cuda.elsewhere = ("Squeeze", "Gather")
    backend = Generator.open(golden_bundle.folder).backend
    assert 0 < backend.placement["CPUExecutionProvider"] <= onnxruntime_cuda.SHAPE_NODES
    assert backend.name == "onnxruntime-cuda"


def test_the_real_onnxruntime_takes_our_session_options(golden_bundle):
    """The CPU provider runs the session, and takes none of the options of CUDA's."""
    from fake_cudart import HostDevice
    with pytest.raises(MissingRequirementError, match="did not take the option user_compute_stream=7"):
        onnxruntime_cuda.OnnxRuntimeExecutor(golden_bundle, HostDevice(), "CPUExecutionProvider",
                                             {"user_compute_stream": "7"})


def kernels(bundle: Bundle) -> str:
    """Whose kernels run a bundle on the CPU here, as the end of a sentence."""
    return f"; {OnnxRuntimeBackend(bundle).kernels.sentence}"


def test_without_the_provider(golden_bundle, monkeypatch):
    monkeypatch.setattr(onnxruntime_cuda, "has_provider", lambda: False)
    with pytest.raises(MissingRequirementError, match=r"uninstall -y onnxruntime onnxruntime-gpu && pip"):
        Generator.open(golden_bundle.folder, backend="onnxruntime-cuda")
    monkeypatch.setattr(choose, "has_provider", lambda: False)
    assert Generator.open(golden_bundle.folder).backend_choice == (
        "the bundle holds no engine; ONNX Runtime has no CUDA provider here" + kernels(golden_bundle))


def having_an_engine(bundle):
    """Nothing is asked of it but whether it is there."""
    return Bundle(bundle.folder, bundle.manifest.model_copy(update={"engines": [SimpleNamespace(graph=None)]}))


def test_auto_without_a_driver(golden_bundle, no_driver, monkeypatch):
    monkeypatch.setattr(choose, "has_provider", lambda: True)
    monkeypatch.setattr(onnxruntime_cuda, "has_provider", lambda: True)
    with_engine = having_an_engine(golden_bundle)
    backend, why = choose.open_backend(with_engine)
    assert backend.name == "onnxruntime"
    assert why == ("No NVIDIA driver is loaded here (nvidia-smi would show it, a container needs --gpus all)"
                   + kernels(golden_bundle))


def test_auto_without_onnx_runtime_says_why_the_engine_is_not_taken(golden_bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(CudaDevice, "open", classmethod(lambda cls: cls(FakeCudart(driver=0))))
    with_engine = having_an_engine(golden_bundle)
    with pytest.raises(MissingRequirementError, match=r"^Nothing here can run .*No NVIDIA driver .*; ONNX Runtime is"):
        choose.open_backend(with_engine)


def test_auto_does_not_hide_a_damaged_engine(golden_bundle, monkeypatch):
    def broken(bundle):
        raise BundleError("damaged")

    monkeypatch.setattr(choose, "open_tensorrt", broken)
    with_engine = having_an_engine(golden_bundle)
    with pytest.raises(BundleError, match="damaged"):
        choose.open_backend(with_engine)


def test_command_line(golden_bundle, no_driver, monkeypatch):
    def run(*more):
        return CliRunner().invoke(main, ["generate", str(golden_bundle.folder), "--prompt-ids", "5,6",
                                         "--max-new-tokens", "4", "--eos-id", "-1", *more])

    result = run("--backend", "tensorrt")
    assert result.exit_code == 3 and "holds no engine; build one with: dmoe-export build" in result.stderr
    assert result.stdout == "" and result.stderr.count("\n") == 1
    monkeypatch.setattr(onnxruntime_cuda, "has_provider", lambda: True)
    result = run("--backend", "onnxruntime-cuda")
    assert result.exit_code == 3 and "No NVIDIA driver" in result.stderr
    result = run("--backend", "onnxruntime", "--json")
    why = "as asked for" + kernels(golden_bundle)
    assert json.loads(result.stdout)["backend"] == {"name": "onnxruntime", "why": why}
    assert f"on onnxruntime: {why}; products exact (float32)]" in run("--backend", "onnxruntime").stderr
    assert run("--backend", "cuda").exit_code == 2


def test_blocks_larger_than_the_engine_takes(golden_bundle):
    backend = OnnxRuntimeBackend(golden_bundle)
    backend.limits = Limits(max_batch=2, max_tokens=31)
    with pytest.raises(RequestError, match=r"at most 31 tokens in one forward, a block has 32; .*--max-prefill 32"):
        decode(backend, [[1]], max_new_tokens=2)
    backend.limits = Limits(max_batch=2, max_tokens=70)
    prompt = list(range(3, 200))
    tokens, last = decode(backend, [prompt], max_new_tokens=2, eos_id=-1)
    assert last[0].statistics.forwards_by_phase["prefill"] == 3  # of 64, as blocks are whole
    backend.limits = None
    assert tokens == decode(backend, [prompt], max_new_tokens=2, eos_id=-1)[0]
    backend.limits = Limits(max_batch=2)
    with pytest.raises(RequestError, match="3 prompts at once are more than the engine was built for"):
        decode(backend, [[1]] * 3, max_new_tokens=2)
