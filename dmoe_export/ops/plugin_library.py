"""The plugin library, which computes the ops in TensorRT: where it is, which build it is, and registering it.

Only `build` and `runtime/gpu/tensorrt_engine.py` load it; what an engine file carries itself needs nothing of this.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import MissingRequirementError
from ..libraries import library as installed
from . import add_norm, block_route, experts, head, mixture, router, self_attention
from .experts.fragments import LAYOUT
from .schema import PLUGIN_NAMESPACE

LIBRARY = "libdmoe_plugins.so"
INSTALLED = installed(LIBRARY).parent
NAMES = (
    add_norm.SCHEMA.name,
    block_route.SCHEMA.name,
    experts.SCHEMA.name,
    head.SCHEMA.name,
    mixture.SCHEMA.name,
    router.SCHEMA.name,
    self_attention.SCHEMA.name,
)


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
    return read_library(found)


def read_library(path: Path) -> PluginLibrary:
    """The library of an existing file; raises MissingRequirementError when it is none."""
    try:
        library = ctypes.CDLL(str(path))
        library.dmoe_build_id.restype = ctypes.c_char_p
        if (layout := library.dmoe_experts_layout()) != LAYOUT:
            raise AttributeError(f"it reads quantised experts in layout {layout}, not {LAYOUT}")
        return PluginLibrary(path.resolve(), library.dmoe_build_id().decode())
    except (OSError, AttributeError) as error:
        raise MissingRequirementError(
            f"{path} cannot be used as the plugin library ({error}); build it again with `make plugins`.") from None


def is_registered(trt: Any) -> bool:
    """Whether this process's TensorRT knows our plugins."""
    registry = trt.get_plugin_registry()
    return all(registry.get_creator(name, "1", PLUGIN_NAMESPACE) is not None for name in NAMES)


def register(trt: Any, library: PluginLibrary) -> None:
    """Make the plugins known to TensorRT; raises MissingRequirementError."""
    if not is_registered(trt):  # reading the library may have registered it already
        trt.get_plugin_registry().load_library(str(library.path))
    if not is_registered(trt):
        raise MissingRequirementError(
            f"TensorRT {trt.__version__} did not take the plugins of {library.path}; build it again with "
            "`make plugins` against the headers of this TensorRT.")


def is_embedded(flavour: str, flags: Sequence[str]) -> bool:
    """Whether engines of a flavour, built with these flags, carry the library.

    TensorRT-RTX's do; TensorRT's header promises it of version-compatible engines only.
    """
    return flavour == "tensorrt-rtx" or "version-compatible" in flags
