"""Python in a process of its own, without some packages."""

from __future__ import annotations

import subprocess
import sys

_BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
"""
EXPORTER = ("torch", "onnx", "onnx_ir", "onnxscript", "huggingface_hub")


def python_without(code, *arguments, blocked=EXPORTER):
    """Run code in a process where these packages do not exist."""
    command = [sys.executable, "-c", _BLOCKED.format(names=blocked) + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)
