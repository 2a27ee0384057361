"""The ONNX Runtime CUDA backend: the bundle's graph on the GPU, bound to device addresses.

Nothing here has run on a GPU yet: tests run it with the CPU provider on memory that stands in for the device's.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from ..bundle.reader import Bundle
from ..description import Precision
from ..errors import MissingRequirementError
from .backend import Limits
from .device import CPU_INSTEAD, CudaDevice, Device
from .device_backend import DeviceBackend
from .device_call import Call, Launcher, Sizes, Tensor, round_up
from .device_memory import Pool
from .ort_custom_ops import check_session, choose_custom_ops, prepare_session

PROVIDER = "CUDAExecutionProvider"
_BF16 = 16  # ONNX TensorProto.BFLOAT16; numpy has no such type
_DTYPES: dict[str, Any] = {"int64": np.int64, "int32": np.int32, "fp32": np.float32, "fp16": np.float16, "bf16": _BF16}
_HEAVY = {"MoE", "QMoE", "MatMul", "Gemm", "FusedMatMul"}


class OnnxRuntimeExecutor:
    """Runs calls with a session of ONNX Runtime whose inputs and outputs are bound to addresses."""

    def __init__(self, bundle: Bundle, device: Device, provider: str = PROVIDER,
                 options: dict[str, str] | None = None, custom_ops: Path | None = None) -> None:
        """`options` of the provider; `custom_ops`: a library of our kernels, None for the graph's own bodies.

        Raises MissingRequirementError when the session does not run on the provider with them.
        """
        self.precision: Precision = bundle.manifest.precision
        self.limits: Limits | None = None
        self._device_type = device.kind
        settings = ort.SessionOptions()
        settings.log_severity_level = 3
        settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        path, options = bundle.denoiser_path, options or {}
        model = prepare_session(bundle, settings, custom_ops) if custom_ops else str(path)
        try:
            self._session = ort.InferenceSession(model, settings, providers=[(provider, options)])
        except Exception as error:  # onnxruntime raises its own kinds
            raise MissingRequirementError(
                f"ONNX Runtime {ort.__version__} cannot load {path} on {provider}: {str(error).splitlines()[0]} "
                "Upgrade with: pip install -U onnxruntime-gpu.") from error
        self._session.disable_fallback()
        _check_provider(self._session, provider, options)
        if custom_ops:
            check_session(self._session, provider)
        self._binding = self._session.io_binding()
        self._bound: dict[str, Tensor] = {}
        self._inputs = {entry.name for entry in self._session.get_inputs()}

    def fit(self, least: Sizes, rows_step: int) -> Sizes:
        """See `Executor`; any size will do."""
        return least._replace(rows=round_up(least.rows, rows_step))

    def execute(self, call: Call, stream: int) -> None:
        """See `Executor`; the session has the stream already."""
        for name, tensor in (*call.inputs.items(), *call.outputs.items()):
            if self._bound.get(name) == tensor:
                continue
            bind = self._binding.bind_input if name in self._inputs else self._binding.bind_output
            bind(name, self._device_type, 0, _DTYPES[tensor.dtype], tensor.shape, tensor.address)
            self._bound[name] = tensor
        self._session.run_with_iobinding(self._binding)

    def isolate(self, call: Call, stream: int) -> Launcher | None:
        """See `Executor`: None, a session allocates while it runs."""
        return None


def _check_provider(session: Any, provider: str, options: dict[str, str]) -> None:
    """Refuse a session that quietly went to the CPU, or that ignored an option."""
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
        return  # older versions do not tell
    elsewhere = sorted({node.op_type for part in session.get_provider_graph_assignment_info()
                        if part.ep_name != provider for node in part.get_nodes()} & _HEAVY)
    if elsewhere:
        raise MissingRequirementError(
            f"{provider} of ONNX Runtime {ort.__version__} has no kernel for {', '.join(elsewhere)} in this precision "
            f"and would run it on the CPU; upgrade with: pip install -U onnxruntime-gpu, {CPU_INSTEAD}.")


def has_provider() -> bool:
    """Whether the installed ONNX Runtime has the CUDA provider at all."""
    return PROVIDER in ort.get_available_providers()


def open_onnxruntime_cuda(bundle: Bundle, device: Device | None = None) -> DeviceBackend:
    """The backend on this machine's GPU; raises MissingRequirementError when provider, driver or GPU is missing."""
    if not has_provider():
        raise MissingRequirementError(
            f"ONNX Runtime {ort.__version__} here was built without {PROVIDER}; run: pip uninstall -y onnxruntime && "
            f"pip install onnxruntime-gpu, {CPU_INSTEAD}.")
    custom_ops, reason = choose_custom_ops(bundle)
    if bundle.manifest.quantisation and custom_ops is None:  # QMoE on CUDA takes weights in another layout
        raise MissingRequirementError(
            f"{bundle.folder} has {bundle.manifest.quantisation.name} experts, which {PROVIDER} computes by our custom "
            f"ops alone, and {reason}; export with --dense-precision fp16 and run `make ort-ops`, {CPU_INSTEAD}.")
    device = device or CudaDevice.open()
    if hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
            ort.preload_dlls()
    pool, stream = Pool(device), device.stream()
    # On our stream the provider's work and our copies run in order. TF32 would round the router's float32 products to
    # ten bits, and so choose other experts than the model.
    options = {"device_id": "0", "user_compute_stream": str(stream), "use_tf32": "0"}
    executor = OnnxRuntimeExecutor(bundle, device, options=options, custom_ops=custom_ops)
    return DeviceBackend("onnxruntime-cuda", bundle, device, pool, stream, executor, cuda_graphs=False)
