"""ONNX Runtime, imported when something is first asked of it: `from .ort import ort`.

Two packages bring it, for CPUs and for NVIDIA GPUs, into one folder; pip cannot choose, so neither is a requirement of
every installation (extras `cpu` and `gpu`). What runs an engine, or no model at all, does without.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType
from typing import Any

from ..errors import MissingRequirementError
from ..extras import pip_install

FATAL = 4  # severity of its log: what it finds wrong it raises, too
EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"  # where data of a graph that is no file lies


def _install() -> str:
    return f"{pip_install('cpu')}, or for an NVIDIA GPU {pip_install('gpu')}"


class _OnnxRuntime:
    """Stands for the module: its attributes are the module's."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_module(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(_module(), name, value)


def _module() -> ModuleType:
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read as it is imported; without, 1.29 and newer call home
    try:
        module = importlib.import_module("onnxruntime")
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":
            raise
        raise MissingRequirementError(f"ONNX Runtime is not installed; run: {_install()}.") from None
    if not hasattr(module, "InferenceSession"):  # a folder that an uninstalled package left
        raise MissingRequirementError("ONNX Runtime is installed in part (two packages share its folder, and one was "
                                      f"removed); run: pip uninstall -y onnxruntime onnxruntime-gpu && "
                                      f"{_install()}.")
    return module


ort: Any = _OnnxRuntime()
