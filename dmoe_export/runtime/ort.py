"""ONNX Runtime, imported when something is first asked of it: `from .ort import ort`.

Two packages bring it, for CPUs and for NVIDIA GPUs, into one folder; pip cannot choose, so neither is a requirement of
every installation (extras `cpu` and `gpu`). What runs an engine, or no model at all, does without.
"""

from __future__ import annotations

import importlib
import re
from types import ModuleType
from typing import Any

from ..errors import MissingRequirementError
from ..extras import pip_install

# What ONNX Runtime says of a graph that is newer than it is; nothing else is mended by a newer version.
_TOO_NEW = re.compile(r"not a registered function|No Op registered|No opset import|under development|NOT_IMPLEMENTED|"
                      r"Could not find an implementation|IR version|IR_VERSION|Unrecognized attribute")

# What it says of weights behind a link, and the versions that follow no link at all.
_ELSEWHERE, _FILE = re.compile(r"escapes (both )?model directory"), re.compile(r'External data path: "([^"]*)"')
_NO_LINKS = re.compile(r"1\.24\.[0-3]$")

EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"  # where data of a graph that is no file lies


def why_not_loaded(error: Exception, package: str) -> str:
    """ONNX Runtime's reason for refusing a graph, and what may help, as the end of a sentence."""
    reason = (str(error).splitlines() or [type(error).__name__])[0].strip().rstrip(".")
    if _ELSEWHERE.search(str(error)):
        named = _FILE.search(str(error))
        file = named[1] if named else "a data file"
        advice = ("upgrade with: pip install -U " + package if _NO_LINKS.match(ort.__version__) else
                  "copy the bundle with the files in place of links, with: cp -rL BUNDLE COPY")
        return f"{file} is a link to another folder than the graph's own; {advice}"
    if _TOO_NEW.search(str(error)):
        return f"{reason}; upgrade with: pip install -U {package}"
    if isinstance(error, MemoryError) or re.search(r"bad_alloc|allocate memory|out of memory", str(error)):
        return f"{reason}; free memory, or choose a smaller bundle"
    return f"{reason}; look with dmoe-export inspect, and export the bundle again if its files are whole"


def _install() -> str:
    return f"{pip_install('cpu')}, or for an NVIDIA GPU {pip_install('gpu')}"


class _OnnxRuntime:
    """Stands for the module: its attributes are the module's."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_module(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(_module(), name, value)


def _module() -> ModuleType:
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
