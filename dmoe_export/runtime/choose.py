"""Which backend runs a bundle here, and why."""

from __future__ import annotations

from typing import Literal, TypeVar

from ..bundle.reader import Bundle
from ..errors import MissingRequirementError, as_clause
from .backend import Backend
from .cpu.backend import OnnxRuntimeBackend
from .cpu.products import Products, on_cpus_only
from .cpu.resident import open_resident
from .gpu.backend import DeviceBackend
from .gpu.onnxruntime import has_provider, open_onnxruntime_cuda
from .gpu.resident import open_tensorrt_under_budget
from .gpu.tensorrt import open_tensorrt
from .residency.backend import ResidentBackend
from .residency.budget import ExpertBudget
from .residency.policy import Interval

_Told = TypeVar("_Told", OnnxRuntimeBackend, DeviceBackend, ResidentBackend)

BackendName = Literal["auto", "onnxruntime", "onnxruntime-cuda", "tensorrt"]
BACKENDS: tuple[BackendName, ...] = ("auto", "onnxruntime", "onnxruntime-cuda", "tensorrt")


def open_backend(bundle: Bundle, name: BackendName = "auto", threads: int | None = None,
                 products: Products = "exact") -> tuple[Backend, str]:
    """The backend, and a short sentence why it is this one.

    "auto" takes TensorRT when the bundle has an engine that runs here, else ONNX Runtime's CUDA provider when there is
    one and a GPU, else the CPU; a name means that one or an error. `threads`: of one operator on the CPU. `products`:
    fast ones are the CPU's, so "auto" then takes it. Raises MissingRequirementError, BundleError, RequestError.
    """
    on_cpus_only(products, name)
    if name == "tensorrt":
        return open_tensorrt(bundle), "as asked for"
    if name == "onnxruntime-cuda":
        return _with_kernels(open_onnxruntime_cuda(bundle), "as asked for")
    if name == "onnxruntime":
        return _with_kernels(OnnxRuntimeBackend(bundle, threads, products=products), "as asked for")
    if products == "fast":
        return _with_kernels(OnnxRuntimeBackend(bundle, threads, products=products),
                             "fast products of the CPU were asked for")
    reasons = []
    if not bundle.manifest.denoiser_engines:
        reasons.append("the bundle holds no engine")
    else:
        try:
            return open_tensorrt(bundle), "the bundle has an engine for this GPU"
        except MissingRequirementError as error:
            reasons.append(as_clause(error))
    try:
        provider = has_provider()
    except MissingRequirementError as error:  # without ONNX Runtime there is nothing left, and the reasons matter
        raise MissingRequirementError(f"Nothing here can run {bundle.folder}: {'; '.join(reasons)}; {error}") from None
    if not provider:
        reasons.append("ONNX Runtime has no CUDA provider here")
    else:
        try:
            return _with_kernels(open_onnxruntime_cuda(bundle), f"{reasons[0]}; the CUDA provider runs here")
        except MissingRequirementError as error:
            reasons.append(as_clause(error))
    return _with_kernels(OnnxRuntimeBackend(bundle, threads), "; ".join(dict.fromkeys(reasons)))


def open_under_budget(bundle: Bundle, budget: ExpertBudget, interval: Interval, name: BackendName = "auto",
                      threads: int | None = None, products: Products = "exact") -> tuple[ResidentBackend, str]:
    """The backend that keeps a budget here, and why it is this one.

    "auto" takes TensorRT when the bundle has an engine with expert pools that runs here, else ONNX Runtime on the CPU.
    `products`: as in `open_backend`. Raises as `open_tensorrt_under_budget`, `open_resident` and `open_backend`.
    """
    on_cpus_only(products, name)
    if name == "tensorrt":
        return open_tensorrt_under_budget(bundle, budget, interval), "as asked for"
    why = "the bundle has no engine with expert pools" if name == "auto" else "as asked for"
    if products == "fast" and name == "auto":
        why, name = "fast products of the CPU were asked for", "onnxruntime"
    if name == "auto" and any(entry.expert_pools for entry in bundle.manifest.denoiser_engines):
        try:
            return (open_tensorrt_under_budget(bundle, budget, interval),
                    "the bundle has an engine with expert pools for this GPU")
        except MissingRequirementError as error:
            why = as_clause(error)
    if name not in ("auto", "onnxruntime"):
        raise MissingRequirementError(f"Backend {name} keeps no expert budget, as its experts op reads no slots; "
                                      "choose --backend onnxruntime, or --backend tensorrt with an engine built with "
                                      "--experts resident.")
    return _with_kernels(open_resident(bundle, budget, interval, threads, products), why)


def _with_kernels(backend: _Told, why: str) -> tuple[_Told, str]:
    """With whose kernels run, as the end of the sentence."""
    return backend, "; ".join(filter(None, (why, backend.kernels.sentence)))
