"""The plugin library: where it is, which build it is, and that TensorRT has really taken its plugins."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckError, MissingRequirementError
from ..ops import block_route, experts
from ..ops.schema import PLUGIN_NAMESPACE

LIBRARY = "libdmoe_plugins.so"
INSTALLED = Path(__file__).parents[1] / "lib"  # `make plugins` puts the libraries here
NAMES = (block_route.SCHEMA.name, experts.SCHEMA.name)


@dataclass(frozen=True)
class PluginLibrary:
    """A built plugin library; `build` is the hash of its sources."""

    path: Path
    build: str


def find_library(path: Path | None = None) -> PluginLibrary:
    """The library at `path`, or the installed one; raises MissingRequirementError that says how to get it."""
    found = path or INSTALLED / LIBRARY
    if not found.is_file():
        raise MissingRequirementError(
            f"The plugin library {found} does not exist; build it with `make plugins` (needs no GPU), or name one with "
            "--plugin-library.")
    try:
        library = ctypes.CDLL(str(found))
        library.dmoe_build_id.restype = ctypes.c_char_p
        return PluginLibrary(found.resolve(), library.dmoe_build_id().decode())
    except (OSError, AttributeError) as error:
        raise MissingRequirementError(
            f"{found} cannot be used as the plugin library ({error}); build it again with `make plugins`.") from None


def register(trt: Any, library: PluginLibrary) -> None:
    """Make the plugins known to TensorRT's parser; raises MissingRequirementError."""
    registry = trt.get_plugin_registry()
    if not _registered(registry):  # loading it may have registered it already
        registry.load_library(str(library.path))
    if not _registered(registry):
        raise MissingRequirementError(
            f"TensorRT {trt.__version__} did not take the plugins of {library.path}; build it again with "
            "`make plugins` against the headers of this TensorRT.")


def _registered(registry: Any) -> bool:
    return all(registry.get_creator(name, "1", PLUGIN_NAMESPACE) is not None for name in NAMES)


def count_plugins(trt: Any, network: Any) -> int:
    """How many layers of a parsed network are plugins."""
    return sum(network.get_layer(i).type == trt.LayerType.PLUGIN_V3 for i in range(network.num_layers))


def check_count(plugins: int, expected: int, allow_fallback: bool) -> int:
    """How many custom nodes became ONNX bodies; raises CheckError when that was not allowed."""
    missing = expected - plugins
    if missing and not allow_fallback:
        raise CheckError(f"Only {plugins} of {expected} custom nodes became plugins; register the plugin library with "
                         "this TensorRT, or allow ONNX bodies with --allow-fallback.")
    return missing
