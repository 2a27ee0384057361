"""That TensorRT has really taken the plugins of our library, and what an engine carries of it."""

from __future__ import annotations

from typing import Any

from ..bundle.manifest import Manifest
from ..errors import CheckError
from ..ops import block_route, experts, mixture, router
from ..ops.plugin_library import INSTALLED, LIBRARY, NAMES, PluginLibrary, find_library, is_embedded, register
from .settings import ExpertsOp

__all__ = ["EXPERTS_OPS", "INSTALLED", "LIBRARY", "NAMES", "PluginLibrary", "check_count", "count_plugins",
           "find_library", "is_embedded", "plugin_ops", "register"]

EXPERTS_OPS = (experts.SCHEMA.name, mixture.SCHEMA.name)
"""The ops that read the routed experts' weights."""


def plugin_ops(experts_op: ExpertsOp, manifest: Manifest) -> set[str]:
    """The ops whose nodes become plugins in an engine of the bundle; other custom nodes become their bodies."""
    if manifest.precision == "fp32":  # of routing alone, which is always float32, is there a kernel
        return {block_route.SCHEMA.name}
    moe = manifest.model.moe
    # A router behind a norm of its own reads float32, which its kernel does not; that of its routing does.
    bodies = {router.SCHEMA.name} if moe and moe.own_norm else set()
    return set(NAMES) - bodies - (set(EXPERTS_OPS) if experts_op == "onnx" else set())


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
