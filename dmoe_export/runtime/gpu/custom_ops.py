"""The kernels as ONNX Runtime custom ops on the CUDA provider: which library, and whether to use it.

The CUDA library has not run on a GPU yet; its adapters are tested on the CPU, with emulated kernels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from ...bundle.reader import Bundle
from ...errors import MissingRequirementError, as_clause
from ...libraries import library as installed
from ...ops import add_norm, block_route, experts, head, mixture, router, self_attention
from ...ops.schema import DOMAIN
from ..library import LibrarySession
from ..ort import ort

LIBRARY = "libdmoe_onnxruntime.so"
INSTALLED = installed(LIBRARY)
SERVED = {
    add_norm.SCHEMA.name: "norms",
    block_route.SCHEMA.name: "routing",
    experts.SCHEMA.name: "experts",
    head.SCHEMA.name: "vocabulary head",
    mixture.SCHEMA.name: "experts",
    router.SCHEMA.name: "routing",
    self_attention.SCHEMA.name: "attention",
}

CustomOps = Literal["auto", "on", "off"]


def choose_custom_ops(bundle: Bundle, wanted: CustomOps = "auto") -> tuple[Path | None, str]:
    """The library a session on the CUDA provider should use; None for the ONNX bodies, and a clause saying why.

    "auto" takes the library where it can be loaded and has kernels for the bundle's precision; "on" means that or
    MissingRequirementError. That it is faster than the bodies follows from counting launches and bytes
    (plugins/onnxruntime/README.md); it has not been measured.
    """
    if wanted == "off":
        return None, "custom ops are off"
    if wanted == "auto" and bundle.manifest.precision == "fp32":
        return None, "the custom ops have no fp32 kernels"
    if wanted == "auto" and not INSTALLED.is_file():
        return None, "no custom-op library is installed"
    _check_precision(bundle)
    found = find_library()
    try:
        LibrarySession(found)
    except MissingRequirementError as error:
        if wanted == "on":
            raise
        return None, as_clause(error)
    return found, ""


def find_library(path: Path | None = None) -> Path:
    """The library at `path`, or the installed one; raises MissingRequirementError that says how to get it."""
    found = path or INSTALLED
    if not found.is_file():
        raise MissingRequirementError(
            f"The custom-op library {found} does not exist; build it with `make ort-ops` (needs no GPU), or leave the "
            "custom ops off.")
    return found.resolve()


def prepare_session(bundle: Bundle, options: ort.SessionOptions, library: Path | None = None) -> LibrarySession:
    """Register the library with `options`, for a session over the bundle's graph file as it is.

    `library`: another one than the installed one. Call `check_session` on the session. Raises MissingRequirementError
    when the library is missing or does not load, or when the bundle is fp32.
    """
    _check_precision(bundle)
    session = LibrarySession(find_library(library))
    session.register(options)
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return session


def check_session(session: Any, provider: str) -> None:
    """Raise MissingRequirementError unless every custom node runs on `provider`: a library for another may load too."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return  # older versions do not tell; a library built for one provider has no kernel for another one
    for part in session.get_provider_graph_assignment_info():
        strays = {node.op_type for node in part.get_nodes() if node.domain == DOMAIN and part.ep_name != provider}
        if strays:
            raise MissingRequirementError(
                f"The custom-op library runs {', '.join(sorted(strays))} on {part.ep_name} where {provider} was asked "
                "for; build the library for it with `make ort-ops`.")


def _check_precision(bundle: Bundle) -> None:
    if bundle.manifest.precision == "fp32":
        option = "--dense-precision" if bundle.manifest.quantisation else "--precision"
        raise MissingRequirementError(
            f"{bundle.folder} has precision fp32, for which the custom op {experts.SCHEMA.name} has no kernels; export "
            f"with --compute fp16 {option} fp16, or leave the custom ops off.")

