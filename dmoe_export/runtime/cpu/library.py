"""Our kernels for ONNX Runtime's CPU provider, experts and linear layers: used where installed, and told.

Without their library the experts' ONNX body (com.microsoft.MoE) and Gemm run, with the same tokens, slower.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Literal

from ...bundle.manifest import Manifest
from ...errors import MissingRequirementError
from ...ops import experts
from ..gpu.custom_ops import without_bodies
from ..ort import ort
from .linear_layers import with_linear

INSTALLED = Path(__file__).parents[2] / "lib" / "libdmoe_cpu.so"

CpuOps = Literal["auto", "on", "off"]


def uses_cpu_ops(wanted: CpuOps = "auto") -> bool:
    """Whether the library would be used."""
    return wanted == "on" or (wanted == "auto" and INSTALLED.is_file())


def use_cpu_ops(model: str | bytes, options: ort.SessionOptions, wanted: CpuOps = "auto") -> str | bytes:
    """The graph to make a CPU session from: with the library registered, the experts op without its body, linear layers
    as an op of ours.

    `model` is a file or a serialised graph, and comes back as it is where the library is not used: "off", or "auto" and
    it is not installed, or no node asks for it. Raises MissingRequirementError where it should be used and cannot.
    """
    if not uses_cpu_ops(wanted):
        return model
    if not INSTALLED.is_file():
        raise MissingRequirementError(f"The CPU kernels {INSTALLED} do not exist; build them with `make cpu-ops`, or "
                                      "leave them off.")
    graph = model if isinstance(model, bytes) else Path(model).read_bytes()
    try:
        rest = with_linear(without_bodies(graph, {experts.SCHEMA.name}))
    except ValueError:
        return model  # no ONNX model: let ONNX Runtime say so
    if rest == graph:
        return model
    try:
        _check_whole(INSTALLED)
        options.register_custom_ops_library(str(INSTALLED))
    except Exception as error:  # onnxruntime raises its own kinds
        raise MissingRequirementError(
            f"ONNX Runtime {ort.__version__} cannot use the CPU kernels {INSTALLED} "
            f"({str(error).splitlines()[0].rstrip('.')}); build them again with `make cpu-ops`.") from error
    return rest


def _check_whole(library: Path) -> None:
    """Raises ValueError for a library that was cut short: the loader would end the process."""
    with library.open("rb") as file:
        header = file.read(64)
    if header[:5] == b"\x7fELF\x02" and len(header) == 64:
        at, = struct.unpack_from("<Q", header, 0x28)  # the table of sections, at the end
        size, count = struct.unpack_from("<HH", header, 0x3A)
        if library.stat().st_size < at + size * count:
            raise ValueError("it was cut short")


def kernels_clause(manifest: Manifest) -> str:
    """Whose kernels compute the products with weights on the CPU, as an end of a sentence."""
    what = "experts and linear layers" if manifest.experts else "linear layers"
    where = "our CPU kernels" if INSTALLED.is_file() else "ONNX Runtime's own ops"
    return f"; {what} on {where}"
