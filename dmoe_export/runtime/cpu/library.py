"""Our kernels for ONNX Runtime's CPU provider, experts, linear layers and attention: used where they can be, and told.

Without them the bodies of these ops run (com.microsoft.MoE and QMoE, Gemm, MatMulNBits), with the same tokens, slower.
"""

from __future__ import annotations

from typing import Literal

from ...errors import MissingRequirementError, as_clause
from ...libraries import library
from ...ops import attention, experts, linear
from ..library import ExpertSource, LibrarySession
from ..ort import ort

INSTALLED = library("libdmoe_cpu.so")
SERVED = {experts.SCHEMA.name: "experts", linear.SCHEMA.name: "linear layers",
          linear.QUANTISED_SCHEMA.name: "linear layers", attention.SCHEMA.name: "attention"}

CpuOps = Literal["auto", "on", "off"]


def open_library(wanted: CpuOps, options: ort.SessionOptions,
                 source: ExpertSource | None = None) -> tuple[LibrarySession | None, str]:
    """The library, registered with `options`; else None, and why not, as a clause.

    "on" means the library or MissingRequirementError. `source`: who holds the experts' weights.
    """
    if wanted == "off":
        return None, "our CPU kernels are off"
    if not INSTALLED.is_file():
        if wanted == "on":
            raise MissingRequirementError(f"The CPU kernels {INSTALLED} do not exist; build them with `make cpu-ops`, "
                                          "or leave them off.")
        return None, ("our CPU kernels are not installed: pip install . in a checkout of dmoe-export, with a C++ "
                      "compiler, brings them")
    try:
        session = LibrarySession(INSTALLED, source)
    except MissingRequirementError as error:
        if wanted == "on":
            raise
        return None, as_clause(error)
    session.register(options)
    return session, ""
