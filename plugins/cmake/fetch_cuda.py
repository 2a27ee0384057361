"""Fetch from the package index what compiling for GPUs needs; CMake calls it where a machine lacks it (DMOE_FETCH).

    python plugins/cmake/fetch_cuda.py cuda|tensorrt FOLDER     nvcc into FOLDER/cuda, headers into FOLDER/tensorrt

Standard library and pip.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

COMPILER = "cuda-toolkit[nvcc,cudart,cccl,crt,nvvm]==13.*"
HEADERS = "kernel-lens==2.0.1"  # carries the Apache-2.0 headers of TensorRT 10.14


def pip(*arguments: str | Path) -> None:
    """Pip of this interpreter, isolated: pip's own build environments hide it otherwise."""
    command = [sys.executable, "-I", "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run([str(part) for part in command], check=False)
    if done.returncode:
        sys.exit(f"[fetch] pip could not fetch {arguments[-1]}; what it said stands above.")


def fetch_cuda(target: Path) -> None:
    """CUDA's compiler and headers."""
    pip("install", "--target", target, COMPILER)
    for compiler in target.glob("nvidia/*/bin/nvcc"):
        toolkit = compiler.parent.parent
        if (toolkit / "lib").is_dir() and not (toolkit / "lib64").exists():
            (toolkit / "lib64").symlink_to("lib")  # where nvcc and CMake look


def fetch_tensorrt(target: Path) -> None:
    """TensorRT's headers alone."""
    target.mkdir(parents=True, exist_ok=True)
    pip("download", "--no-deps", "--dest", target, HEADERS)
    with zipfile.ZipFile(next(target.glob("*.whl"))) as wheel:
        wheel.extractall(target, [name for name in wheel.namelist() if "/tensorrt/" in name and name.endswith(".h")])


if __name__ == "__main__":
    what, folder = sys.argv[1], Path(sys.argv[2])
    print(f"[fetch] {COMPILER if what == 'cuda' else HEADERS} into {folder / what}", file=sys.stderr)
    {"cuda": fetch_cuda, "tensorrt": fetch_tensorrt}[what](folder / what)
