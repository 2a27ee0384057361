"""Builds of plugins/ that tests share, by its presets. Standard library only."""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def build(preset: str, *options: str, folder: Path | None = None, target: str = "all") -> Path:
    """Configure and build into build/PRESET, or `folder`; quick when nothing changed. Returns the folder.

    The test workers share a folder: one builds, the others wait for it. Raises RuntimeError with what was printed.
    """
    folder = folder or ROOT / "build" / preset
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _cmake("-S", ROOT / "plugins", "--preset", preset, "-B", folder, *options)
        _cmake("--build", folder, "--target", target)
    return folder


def cached(folder: Path, name: str) -> str:
    """A value of CMake's cache in a folder that was configured."""
    return re.findall(rf"^{name}:\w+=(.*)", (folder / "CMakeCache.txt").read_text(), re.MULTILINE)[0]


def _cmake(*arguments: str | Path) -> None:
    paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    try:
        done = subprocess.run(["cmake", *map(str, arguments)], env={**os.environ, "PATH": paths}, capture_output=True,
                              text=True, check=False)
    except FileNotFoundError:
        raise RuntimeError("Building plugins/ needs CMake: pip install '.[dev]'") from None
    if done.returncode:
        raise RuntimeError(f"cmake {' '.join(map(str, arguments))} failed:\n{done.stdout}\n{done.stderr}")
