"""CUDA and cuDNN as NVIDIA's Python packages bring them, for ONNX Runtime's CUDA provider, which links them by name."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from pathlib import Path

from ..ort import ort

_WANTED = ("libcudart.so.*", "libcublas.so.*", "libcudnn.so.*")


def nvidia_folders() -> list[Path]:
    """Folders of the installed packages `nvidia-*` that hold libraries the provider needs, in import order.

    From CUDA 13 on one folder holds the toolkit's (nvidia/cu13/lib), before each library had its own; cuDNN has.
    """
    spec = importlib.util.find_spec("nvidia")
    roots = map(Path, (spec.submodule_search_locations or ()) if spec else ())
    return [folder for root in roots for folder in sorted(root.glob("*/lib"))
            if any(next(folder.glob(pattern), None) for pattern in _WANTED)]


def load_nvidia_libraries() -> None:
    """Load them before the provider asks for them; what is missing is the provider's to say.

    ONNX Runtime itself looks beside its own package only, so that one in another folder than NVIDIA's finds nothing.
    """
    if not hasattr(ort, "preload_dlls"):
        return
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
        for folder in nvidia_folders():
            ort.preload_dlls(directory=str(folder))
        ort.preload_dlls()
