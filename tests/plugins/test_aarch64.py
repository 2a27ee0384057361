"""The CPU kernels of aarch64, compiled for it and run under QEMU: no such machine has been used yet."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "plugins" / "cpu"
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
FLAGS = ["-std=gnu++17", "-O2", "-Wall", "-Wextra", "-Werror", f"-I{SOURCES}"]


@pytest.mark.slow
@pytest.mark.parametrize(("processor", "integers"), [("max", "neon-dotprod int8"), ("cortex-a72", "float32")])
def test_products_on_aarch64(processor, integers, tmp_path):
    """With the dot product instructions, and on a processor without them."""
    if not (shutil.which(COMPILER) and shutil.which(EMULATOR)):
        pytest.skip(f"{COMPILER} or {EMULATOR} is not there: apt-get install g++-aarch64-linux-gnu qemu-user-static")
    objects = []
    for source in (HERE / "products_check.cpp", *(SOURCES / name for name in (
            "isa.cpp", "products.cpp", "isa_generic.cpp", "isa_neon_dotprod.cpp"))):
        objects.append(str(tmp_path / f"{source.stem}.o"))
        dotprod = ["-march=armv8.2-a+dotprod"] if "neon" in source.name else []
        subprocess.run([COMPILER, *FLAGS, *dotprod, "-c", str(source), "-o", objects[-1]], check=True, timeout=200)
    program = str(tmp_path / "check")
    subprocess.run([COMPILER, "-static", *objects, "-o", program], check=True, timeout=60)
    done = subprocess.run([EMULATOR, "-cpu", processor, program], capture_output=True, text=True, timeout=200,
                          check=False)
    assert done.returncode == 0, done.stdout
    assert done.stdout.split("\n") == ["float32", "float32", *["float32", integers] * 2, "float32", "float32", ""]
