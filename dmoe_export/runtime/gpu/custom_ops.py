"""The kernels as ONNX Runtime custom ops: which library, whether to use it, and a graph that cannot do without it.

A session takes a registered custom op rather than the model-local function of the same name, and takes the function
without a word when there is no such op (tried with ONNX Runtime 1.31). So the session gets a copy of the graph without
the functions: what the library does not bring is then an error.

The CUDA library has not run on a GPU yet; its adapters are tested on the CPU, with emulated kernels.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

from ...bundle.reader import Bundle
from ...errors import BundleError, MissingRequirementError
from ...ops import block_route, experts
from ...ops.schema import DOMAIN
from ..cpu import protobuf
from ..cpu.linked_files import model_for_session
from ..ort import ort

LIBRARY = "libdmoe_onnxruntime.so"
INSTALLED = Path(__file__).parents[2] / "lib" / LIBRARY
NAMES = (block_route.SCHEMA.name, experts.SCHEMA.name)

CustomOps = Literal["auto", "on", "off"]

_MODEL_FUNCTIONS, _FUNCTION_NAME, _FUNCTION_DOMAIN = 25, 1, 10  # field numbers in onnx.proto


def choose_custom_ops(bundle: Bundle, wanted: CustomOps = "auto") -> tuple[Path | None, str]:
    """The library a session on the CUDA provider should use, None for the ONNX bodies, and a clause saying why.

    "auto" takes the library where it is installed and has kernels for the bundle's precision; "on" means that or
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
    return find_library(), "custom ops"


def find_library(path: Path | None = None) -> Path:
    """The library at `path`, or the installed one; raises MissingRequirementError that says how to get it."""
    found = path or INSTALLED
    if not found.is_file():
        raise MissingRequirementError(
            f"The custom-op library {found} does not exist; build it with `make ort-ops` (needs no GPU), or leave the "
            "custom ops off.")
    return found.resolve()


def prepare_session(bundle: Bundle, options: ort.SessionOptions, library: Path | None = None) -> bytes:
    """Register the library with `options` and return the graph to make the session from, weights left in their files.

    `library`: another one than the installed one. Call `check_session` on the session. Raises MissingRequirementError
    when the library is missing or does not load, or when the bundle is fp32.
    """
    _check_precision(bundle)
    found = find_library(library)
    try:
        options.register_custom_ops_library(str(found))
    except Exception as error:  # onnxruntime raises its own kinds
        raise MissingRequirementError(
            f"ONNX Runtime {ort.__version__} cannot use the custom-op library {found} "
            f"({str(error).splitlines()[0].rstrip('.')}); build it again with `make ort-ops`.") from error
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    try:
        graph = model_for_session(without_bodies(bundle.denoiser_path.read_bytes()), bundle, options)
        assert isinstance(graph, bytes)
        return graph
    except ValueError as error:
        raise BundleError(f"{bundle.denoiser_path} is not an ONNX model ({error}); export the bundle again.") from error


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
            f"{bundle.folder} has precision fp32, for which the custom op {NAMES[1]} has no kernels; export with "
            f"{option} fp16 or bf16, or leave the custom ops off.")


def without_bodies(model: bytes, names: Collection[str] = NAMES) -> bytes:
    """A serialised ModelProto without its functions of our domain of these names; ValueError when it is no model.

    By hand, because `onnx` is not among the packages needed at run time.
    """
    kept = []
    for field, value, whole in protobuf.fields(model):
        parts = {inner: part for inner, part, _ in protobuf.fields(value)} if field == _MODEL_FUNCTIONS else {}
        ours = (parts.get(_FUNCTION_DOMAIN) == DOMAIN.encode()
                and parts.get(_FUNCTION_NAME, b"").decode() in names)
        if not ours:
            kept.append(whole)
    return b"".join(kept)
