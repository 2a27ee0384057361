"""Sessions of ONNX Runtime's CPU provider over a bundle's graphs."""

from __future__ import annotations

from typing import Any, Protocol

from ...bundle.reader import Bundle
from ...errors import BundleError, MissingRequirementError
from ...ops.schema import DOMAIN
from ..ort import ort, why_not_loaded
from .library import INSTALLED, CpuOps, use_cpu_ops
from .linked_files import model_for_session
from .walls import wall_at_experts

_QUANTISED_FROM = 1, 25

_LOST, _EXPERTS_LOST = "was cut short while it was read", "the file of the experts"  # as plugins/cpu/op_*.cpp say it


class Session(Protocol):
    """What computes the graph."""

    def run(self, wanted: list[str], feeds: dict[str, Any]) -> list[Any]:
        """The wanted outputs, in this order."""
        ...


def open_session(model: str | bytes, bundle: Bundle, threads: int | None, alone: bool = True,
                 cpu_ops: CpuOps = "auto") -> Any:
    """A session over a file or, as bytes, an edited graph over the bundle's data files.

    `alone`: not one of many that run in turn; these should neither take the processor from each other, by threads that
    wait for work awake, nor keep memory of their own. `cpu_ops`: whether our kernels compute experts and linear layers
    ("auto": where installed). Raises MissingRequirementError where this ONNX Runtime cannot load it.
    """
    path = bundle.denoiser_path if isinstance(model, bytes) else model
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads:
        options.intra_op_num_threads = threads
    if not alone:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.enable_cpu_mem_arena = False
    with_kernels = use_cpu_ops(model, options, cpu_ops)
    if with_kernels is model:
        _check_version(bundle)
    elif isinstance(with_kernels, bytes) and bundle.manifest.precision == "fp16":
        with_kernels = wall_at_experts(with_kernels)  # as under an expert budget, so that answers are the same
    model = model_for_session(with_kernels, bundle, options)
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises its own kinds, all of them about this file
        if f"{DOMAIN}:Dmoe" in str(error) and "is not a registered function/op" in str(error):
            raise MissingRequirementError(
                f"The CPU kernels {INSTALLED} do not fit this program; build them again with `make cpu-ops`."
            ) from error
        raise MissingRequirementError(f"ONNX Runtime {ort.__version__} cannot load {path}: "
                                      f"{why_not_loaded(error, 'onnxruntime')}.") from error


def _check_version(bundle: Bundle) -> None:
    """QMoE of older versions takes the nibbles of int4 in another order, without a word."""
    how, version = bundle.manifest.quantisation, ort.__version__
    if how and tuple(map(int, version.split(".")[:2])) < _QUANTISED_FROM:
        raise MissingRequirementError(
            f"{bundle.folder} has {how.name} experts, which ONNX Runtime {version} computes wrongly; upgrade with: "
            "pip install -U onnxruntime, or build our CPU kernels with `make cpu-ops`.")


def run_session(session: Session, bundle: Bundle, wanted: list[str], feeds: dict[str, Any]) -> list[Any]:
    """The wanted outputs. Raises BundleError where our CPU kernels found a weight file cut short while they read."""
    try:
        return session.run(wanted, feeds)
    except Exception as error:  # onnxruntime raises its own kinds
        if _LOST not in str(error):
            raise
        experts = bundle.manifest.experts if _EXPERTS_LOST in str(error) else None
        file = experts.file if experts else f"{bundle.manifest.denoiser.file}.data"
        raise BundleError(f"{bundle.folder / file} was changed or removed while it was in use; "
                          "open the bundle again.") from None
