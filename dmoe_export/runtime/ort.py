"""ONNX Runtime, imported when something is first asked of it: `from .ort import ort`.

Two packages bring it, for CPUs and for NVIDIA GPUs, into one folder; pip cannot choose, so neither is a requirement of
every installation (extras `cpu` and `gpu`). What runs an engine, or no model at all, does without.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from ..errors import MissingRequirementError


class _OnnxRuntime:
    """Stands for the module: its attributes are the module's."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_module(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(_module(), name, value)


def _module() -> ModuleType:
    try:
        return importlib.import_module("onnxruntime")
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":
            raise
        raise MissingRequirementError("ONNX Runtime is not installed; run: pip install 'dmoe-export[cpu]', or "
                                      "'dmoe-export[gpu]' for an NVIDIA GPU.") from None


ort: Any = _OnnxRuntime()
