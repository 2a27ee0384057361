"""SASS of a kernel, where CUDA's compiler and disassembler are at hand; no GPU needed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from builds import ROOT

KERNELS = ROOT / "plugins" / "kernels"


def _tool(name: str) -> str:
    """The path of a tool of the CUDA toolkit: on PATH, in /usr/local/cuda, fetched, or from a wheel. Skips without."""
    folders = [Path("/usr/local/cuda/bin"), *(ROOT / "build" / "fetched").glob("cuda/nvidia/*/bin")]
    for entry in sys.path:
        folders += Path(entry or ".").glob("nvidia/*/bin")
    path = shutil.which(name) or next((str(f / name) for f in folders if (f / name).is_file()), None)
    if path is None:
        pytest.skip(f"needs {name} of the CUDA toolkit")
    return path


def compile_for(code: str, architecture: int, folder: Path) -> Path:
    """A cubin of `code` (CUDA C++ that may include the kernels' headers) for sm_ARCHITECTURE."""
    source, cubin = folder / "kernel.cu", folder / "kernel.cubin"
    source.write_text(code)
    command = [_tool("nvcc"), "-std=c++17", f"-gencode=arch=compute_{architecture},code=sm_{architecture}", "-cubin",
               f"-I{KERNELS}", "-o", str(cubin), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return cubin


def resources(cubin: Path) -> dict[str, int]:
    """Registers (REG), stack (STACK), static shared memory (SHARED) of the cubin's one kernel."""
    text = _run("cuobjdump", "-res-usage", str(cubin))
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED):(\d+)", text)}


def instructions(cubin: Path) -> list[tuple[int, str]]:
    """Address and text of every instruction of the cubin's one kernel."""
    text = _run("cuobjdump", "-sass", str(cubin))
    return [(int(address, 16), " ".join(body.split()))
            for address, body in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+([^;]*);", text, re.MULTILINE)]


def loop_around(code: list[tuple[int, str]], mark: str) -> list[str]:
    """Instructions of the innermost loop around the only one called `mark…`.

    The compiler's own loops over the lanes' values of an operand (BRA.U.ANY) do not count.
    """
    (middle,) = [address for address, body in code if re.match(rf"(@!?\w+ )?{mark}", body)]
    loops = []
    for address, body in code:
        jump = re.search(r"\bBRA\S* .*?(0x[0-9a-f]+)$", body)
        if jump and "BRA.U.ANY" not in body and int(jump[1], 16) < middle < address:
            loops.append((address - int(jump[1], 16), int(jump[1], 16), address))
    assert loops, f"no loop around {mark}"
    _, start, end = min(loops)
    return [body for address, body in code if start <= address <= end]


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([_tool(tool), *arguments], capture_output=True, text=True, check=True).stdout
