"""Build stubs of cudart, cuBLAS, cuBLASLt, cuDNN and their like, on which ONNX Runtime's real CUDA provider opens.

    python tests/cuda_stubs/build.py --provider libonnxruntime_providers_cuda.so --cuda-include FOLDER --out FOLDER

FOLDER looks like an installation: nvidia/cu13/lib and nvidia/cudnn/lib as NVIDIA's Python packages lay it out, and
driver/ with libcuda. What the provider asks of each library is read off its undefined symbols, so that a provider of
another version gets stubs that fit it. cuDNN is opened by name at run time: its functions are those that stand in the
provider as text. Standard library only, plus a C++ compiler, binutils and CUDA's headers.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
CUDART = tuple(HERE / f"cudart_{part}.cpp" for part in ("state", "device", "memory", "streams"))
LIBRARIES = (HERE / "libraries.cpp",)
SOURCES = (HERE / "build.py", HERE / "stub.h", HERE / "cudart_state.h", *CUDART, *LIBRARIES)
# Work on the device, by a handle that is the first argument; everything else is housekeeping.
_CUBLAS = re.compile(r"cublas(?!Lt|Get|Set).*([gG]emm|geam|get[rR][fi]|copy|scal)")
_CUDNN = re.compile(r"cudnn(ReduceTensor|AddTensor|BackendExecute|[A-Za-z]*Forward|[A-Za-z]*ForwardInference)$")
_HEAD = """#include "stub.h"
#include <cstdlib>
void* stubStreamOf(void* handle);
"""


class StubsError(Exception):
    """No stubs can be built here; one sentence."""


def undefined(library: Path) -> dict[str, set[str]]:
    """Names that `library` takes from others, by the file they must come from ("" where it does not say)."""
    listed = _run("nm", "-D", "--undefined-only", library)
    wanted: dict[str, set[str]] = {}
    for line in listed.splitlines():
        kind, symbol = line.split()[-2:]
        name, _, file = symbol.partition("@")
        if kind == "U":
            wanted.setdefault(file, set()).add(name)
    return wanted


def cudnn_names(library: Path) -> set[str]:
    """cuDNN's functions that the provider looks up by name."""
    return {name.decode() for name in re.findall(rb"\0(cudnn[A-Z]\w+)(?=\0)", library.read_bytes())}


def build(provider: Path, out: Path, cuda_include: Path) -> Path:
    """All stubs for `provider`, in `out`; libcudart's path. Raises StubsError."""
    wanted = undefined(provider)
    version = next((file.rsplit(".", 1)[1] for file in wanted if file.startswith("libcudart.so.")), None)
    if version is None:
        raise StubsError(f"{provider} takes nothing from libcudart: it is no CUDA provider.")
    toolkit, cudnn, driver = (out / part for part in (f"nvidia/cu{version}/lib", "nvidia/cudnn/lib", "driver"))
    for folder in (toolkit, cudnn, driver):
        folder.mkdir(parents=True, exist_ok=True)
    cudart = toolkit / f"libcudart.so.{version}"
    _library(cudart, CUDART, (), wanted[cudart.name], cuda_include)
    needed = re.findall(r"NEEDED\)\s+Shared library: \[(lib(?:cu|nv)[^]]+)\]", _run("readelf", "-d", provider))
    for name in set(needed) - {cudart.name}:
        stem = name.split(".")[0]
        if stem == "libcuda":  # its symbols carry no version
            names = {n for n in wanted.get("", ()) if re.match(r"cu[A-Z]", n)}
            _library(driver / name, LIBRARIES, ("-DSTUB_CUDA",), names, cuda_include, cudart)
            continue
        part = {"libcublas": ("-DSTUB_CUBLAS",), "libcublasLt": ("-DSTUB_CUBLASLT",)}.get(stem, ())
        _library(toolkit / name, LIBRARIES, part, wanted.get(name, set()), cuda_include, cudart)
    _library(cudnn / "libcudnn.so.9", LIBRARIES, ("-DSTUB_CUDNN",), cudnn_names(provider), cuda_include,
             cudart)
    return cudart


def _library(path: Path, sources: tuple[Path, ...], flags: tuple[str, ...], wanted: set[str], cuda_include: Path,
             *others: Path) -> None:
    """One library: its sources, and a function for every name of `wanted` that they do not define."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or "g++"
    options = ("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", f"-I{HERE}", f"-I{cuda_include}", *flags)
    with tempfile.TemporaryDirectory() as work:
        generated, script = Path(work) / "generated.cpp", Path(work) / "exports.map"
        written = [Path(work) / f"{source.stem}.o" for source in sources]
        for source, made in zip(sources, written, strict=True):
            _run(compiler, *options, "-c", source, "-o", made)
        there = {line.split()[-1] for line in _run("nm", "--defined-only", "-g", *written).splitlines() if line}
        generated.write_text(_HEAD + "".join(map(_function, sorted(wanted - there))))
        script.write_text(f"{path.name} {{ global: cuda*; __cuda*; cu*; dmoe_*; local: *; }};\n")
        _run(compiler, *options, "-shared", *written, generated, "-o", path, f"-Wl,-soname,{path.name}",
             f"-Wl,--version-script={script}", *others)


def _function(name: str) -> str:
    """One that answers success; `…Create…` makes an object for its first argument."""
    if _CUBLAS.match(name) or _CUDNN.match(name):
        body = f'dmoe_stub_library(stubStreamOf(first), "{name}");'
    else:
        body = f'dmoe_stub_call("{name}");' + (" *static_cast<void**>(first) = std::calloc(1, 256);"
                                                if "Create" in name else " (void)first;")
    return f"STUB int {name}(void* first) {{ {body} return 0; }}\n"


def _run(*command: str | Path) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise StubsError(f"{command[0]} is not installed.") from None
    if done.returncode:
        raise StubsError(f"{command[0]} failed: {done.stderr.strip()[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--provider", type=Path, required=True, help="libonnxruntime_providers_cuda.so")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cuda-include", type=Path, required=True, help="folder of cuda_runtime_api.h")
    chosen = parser.parse_args()
    try:
        print(build(chosen.provider, chosen.out, chosen.cuda_include))
    except StubsError as problem:
        sys.exit(f"[cuda-stubs] {problem}")
