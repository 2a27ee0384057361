"""The ONNX Runtime CUDA backend: the bundle's graph on the GPU, bound to device addresses, its steps recorded.

Not run on a GPU yet. Tests run it with the CPU provider on memory that stands in for the device's, and with the real
CUDA provider on stubs of CUDA's libraries, whose kernels do nothing (tests/runtime/gpu/test_cuda_provider.py).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...bundle.graph_entries import GraphEntry
from ...bundle.reader import Bundle
from ...description import Precision
from ...errors import MissingRequirementError
from ...extras import pip_install
from ..backend import Limits
from ..graph_errors import not_loaded
from ..library import kernels_of
from ..ort import FATAL, ort
from .backend import DeviceBackend
from .call import Call, Sizes, Tensor, round_up
from .candidates import installed
from .custom_ops import SERVED, CustomOps, check_session, choose_custom_ops, prepare_session
from .device import CPU_INSTEAD, CudaDevice, Device, DeviceError
from .memory import Pool
from .nvidia_libraries import load_nvidia_libraries
from .shared_weights import SharedExperts

PROVIDER = "CUDAExecutionProvider"
_BF16 = 16  # ONNX TensorProto.BFLOAT16; numpy has no such type
_DTYPES: dict[str, Any] = {"int64": np.int64, "int32": np.int32, "fp32": np.float32, "fp16": np.float16, "bf16": _BF16,
                           "bool": np.bool_}
# What the CPU may compute beside the provider: arithmetic on shapes, which no model has more of for being deeper.
SHAPE_OPS = frozenset({"Shape", "Size", "Squeeze", "Unsqueeze", "Concat", "Add", "Sub", "Mul", "Div", "Reshape",
                       "Slice", "Gather", "Cast", "Constant", "Identity"})
SHAPE_NODES = 40
# Both packages own the folder `onnxruntime`: which of them was written last decides, unless there is only one.
UNINSTALL = "pip uninstall -y onnxruntime onnxruntime-gpu"


class OnnxRuntimeExecutor:
    """Runs calls with a session of ONNX Runtime whose inputs and outputs are bound to addresses."""

    def __init__(self, bundle: Bundle, device: Device, provider: str = PROVIDER,
                 options: dict[str, str] | None = None, custom_ops: Path | None = None,
                 why_not: str = "custom ops are off", profile: Path | None = None,
                 graph: GraphEntry | None = None, experts: SharedExperts | None = None) -> None:
        """`options` of the provider; `custom_ops`: a library of our kernels, None for the graph's own bodies (and
        `why_not`, as a clause). `kernels` says what it came to. `graph`: of the bundle, by default the denoiser.
        `experts`: that are on the device already.

        `profile`: ONNX Runtime writes what it did to a file that begins so. Raises MissingRequirementError when the
        session does not run on the provider with them.
        """
        self.precision: Precision = bundle.manifest.precision
        self.limits: Limits | None = None
        self.era = 0
        self._largest = 0
        self._device_type, self._provider = device.kind, provider
        settings = ort.SessionOptions()
        settings.log_severity_level = FATAL
        if profile:
            settings.enable_profiling, settings.profile_file_prefix = True, str(profile)
        graph = graph or bundle.manifest.denoiser
        self.path, options = bundle.folder / graph.file, options or {}
        settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        library = prepare_session(bundle, settings, custom_ops) if custom_ops else None
        self._experts = experts
        if experts:
            experts.give(settings, library)
        try:
            self._session = ort.InferenceSession(str(self.path), settings, providers=[(provider, options)],
                                                 enable_fallback=0)
        except Exception as error:  # onnxruntime raises its own kinds
            raise not_loaded(error, str(self.path), bundle.folder, graph.opset, "onnxruntime-gpu",
                             f" on {provider}") from error
        self._session.disable_fallback()
        self.placement = _check_provider(self._session, provider, options)
        if library:
            check_session(self._session, provider)
        self.kernels = kernels_of(library, graph.nodes(SERVED), SERVED, "our CUDA kernels", why_not)
        self._inputs = {entry.name for entry in self._session.get_inputs()}
        # Our stream is waited for once a step, when the results are on the host; the end of a run is no reason to.
        self._run_options = ort.RunOptions()
        self._run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._binding = _Binding(self)

    def fit(self, least: Sizes, rows_step: int) -> Sizes:
        """See `Executor`; any size will do."""
        sizes = least._replace(rows=round_up(least.rows, rows_step))
        if (size := sizes.batch * max(sizes.tokens, sizes.rows)) > self._largest:
            # The provider keeps a vector of ones for biases and replaces it by a longer one: recorded steps would
            # go on reading the old one.
            self._largest, self.era = size, self.era + 1
        return sizes

    def execute(self, call: Call, stream: int) -> None:
        """See `Executor`; the session has the stream already. Raises DeviceError."""
        self._binding.bind(call)
        self._binding(stream)

    def isolate(self, call: Call, stream: int) -> _Binding | None:
        """See `Executor`. Temporary memory is the session's: whoever runs next on the stream may have it."""
        binding = _Binding(self)
        binding.bind(call)
        return binding

    def close(self) -> None:
        """See `Executor`."""
        del self._binding, self._session  # the binding refers to the executor
        self._experts = None

    def end_profile(self) -> str:
        """The file that ONNX Runtime wrote."""
        return str(self._session.end_profiling())


class _Binding:
    """Addresses of a call, bound to the session; once bound, a launcher (see `Launcher`)."""

    # What is copied from the host inside a run comes from buffers that the provider gives back when the run ends.
    host_reads = False

    def __init__(self, executor: OnnxRuntimeExecutor) -> None:
        self._executor, self._raw = executor, executor._session.io_binding()
        self._bound: dict[str, Tensor] = {}

    def bind(self, call: Call) -> None:
        """Bind what is not bound yet."""
        executor = self._executor
        for name, tensor in (*call.inputs.items(), *call.outputs.items()):
            if self._bound.get(name) == tensor:
                continue
            bind = self._raw.bind_input if name in executor._inputs else self._raw.bind_output
            bind(name, executor._device_type, 0, _DTYPES[tensor.dtype], tensor.shape, tensor.address)
            self._bound[name] = tensor

    def __call__(self, stream: int) -> None:
        executor = self._executor
        try:
            executor._session.run_with_iobinding(self._raw, executor._run_options)
        except Exception as error:  # onnxruntime raises its own kinds
            raise DeviceError(f"ONNX Runtime {ort.__version__} failed on {executor._provider}: "
                              f"{str(error).splitlines()[0].rstrip('.')}.") from error

    def capturable(self, stream: int) -> bool:
        return True


def _check_provider(session: Any, provider: str, options: dict[str, str]) -> dict[str, int]:
    """Refuse a session that quietly went to the CPU, or that ignored an option; nodes by provider."""
    got = session.get_providers()[0]
    if got != provider:
        raise MissingRequirementError(
            f"ONNX Runtime {ort.__version__} could not start {provider} and would run on {got} (its CUDA or cuDNN "
            f"libraries are missing or of another version); run: pip install 'onnxruntime-gpu[cuda,cudnn]', "
            f"{CPU_INSTEAD}.")
    applied = session.get_provider_options()[provider]
    for name, value in options.items():
        if applied.get(name) != value:
            raise MissingRequirementError(
                f"ONNX Runtime {ort.__version__} did not take the option {name}={value} of {provider} (it has "
                f"{applied.get(name)!r}); upgrade with: pip install -U onnxruntime-gpu, {CPU_INSTEAD}.")
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return {}  # older versions do not tell
    placed: dict[str, list[str]] = {}
    for part in session.get_provider_graph_assignment_info():
        placed.setdefault(part.ep_name, []).extend(node.op_type for node in part.get_nodes())
    elsewhere = [op for name, ops in placed.items() if name != provider for op in ops]
    strange = set(elsewhere) - SHAPE_OPS or (set(elsewhere) if len(elsewhere) > SHAPE_NODES else ())
    if strange:
        raise MissingRequirementError(
            f"{provider} of ONNX Runtime {ort.__version__} has no kernel for {', '.join(sorted(strange))} in this "
            f"precision and would run {len(elsewhere)} nodes on the CPU; upgrade with: pip install -U onnxruntime-gpu, "
            f"{CPU_INSTEAD}.")
    return {name: len(ops) for name, ops in placed.items()}


def has_provider() -> bool:
    """Whether the installed ONNX Runtime has the CUDA provider at all."""
    return PROVIDER in ort.get_available_providers()


def open_onnxruntime_cuda(bundle: Bundle, device: Device | None = None, cuda_graphs: bool = True,
                          custom_ops: CustomOps = "auto", profile: Path | None = None) -> DeviceBackend:
    """The backend on this machine's GPU; raises MissingRequirementError when provider, driver or GPU is missing.

    `cuda_graphs`: record steps that repeat. `custom_ops`: our kernels or the graph's bodies ("auto": kernels where they
    are installed and fit). `profile`: where ONNX Runtime writes its profile; see `DeviceBackend.end_profile`.
    """
    if not has_provider():
        raise MissingRequirementError(
            f"ONNX Runtime {ort.__version__} here was built without {PROVIDER}; run: {UNINSTALL} && "
            f"{pip_install('gpu')}, {CPU_INSTEAD}.")
    if bundle.manifest.only_on_cpus:
        raise MissingRequirementError(
            f"{bundle.folder} is {bundle.manifest.precision_in_words}, which the CPU provider alone reads; export "
            f"with --precision fp16 --compute fp16, {CPU_INSTEAD}.")
    library, reason = choose_custom_ops(bundle, custom_ops)
    if bundle.manifest.quantisation and library is None:  # QMoE on CUDA takes weights in another layout
        raise MissingRequirementError(
            f"{bundle.folder} has {bundle.manifest.quantisation.name} experts, which {PROVIDER} computes by our custom "
            f"ops alone, and {reason}; export with --compute fp16 --dense-precision fp16 and run `make ort-ops`, "
            f"{CPU_INSTEAD}.")
    device = device or CudaDevice.open()
    load_nvidia_libraries()
    ort.set_default_logger_severity(FATAL)
    pool, stream = Pool(device), device.stream()
    # On our stream the provider's work and our copies run in order. TF32 would round the router's float32 products to
    # ten bits, and so choose other experts than the model.
    options = {"device_id": "0", "user_compute_stream": str(stream), "use_tf32": "0"}
    salient = bundle.manifest.salient
    several = salient is not None and salient.fixed and bundle.manifest.experts is not None
    experts = SharedExperts(bundle, pool, stream) if several or bundle.manifest.quantisation else None
    opening = partial(OnnxRuntimeExecutor, bundle, device, options=options, custom_ops=library, why_not=reason,
                      experts=experts)

    def checked(executor: OnnxRuntimeExecutor) -> OnnxRuntimeExecutor:
        if executor.kernels.missing and (custom_ops == "on" or bundle.manifest.quantisation):
            raise MissingRequirementError(f"Our CUDA kernels do not fit {executor.path}, which would run with "
                                          f"{executor.kernels.sentence}; build them again with `make ort-ops`.")
        return executor

    executor = checked(opening(profile=profile))
    backend = DeviceBackend("onnxruntime-cuda", bundle, device, pool, stream, executor,
                            lambda graph: lambda: checked(opening(graph=graph)), cuda_graphs,
                            ranking=None if custom_ops == "off" else installed())
    backend.kernels = executor.kernels
    return backend
