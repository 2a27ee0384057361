"""Build libdmoe_cpu.so, ops for ONNX Runtime's CPU provider, and put it where the package finds it.

    python plugins/cpu/build.py [--optional] [--sanitize] [--out FILE]        (make cpu-ops)

Standard library only; needs a C++17 compiler (CXX, else c++) and ONNX Runtime's headers (../onnxruntime/headers.py
finds or fetches them). A few seconds. Every instruction set is compiled, the processor chooses when it runs.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
INSTALLED = HERE.parents[1] / "dmoe_export" / "lib" / "libdmoe_cpu.so"
AVX2 = ("-mavx2", "-mfma", "-mf16c")
SOURCES: dict[str, tuple[str, ...]] = {  # sums over places are also made outside (residency): no fused rounding
    "experts.cpp": ("-ffp-contract=off",), "linear.cpp": (), "lost_pages.cpp": (), "op_experts.cpp": (),
    "op_linear.cpp": (), "residency.cpp": (), "../onnxruntime/register.cpp": (), "../onnxruntime/session.cpp": (),
    "isa_generic.cpp": ()}
if platform.machine() in ("x86_64", "AMD64"):
    AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")
    SOURCES |= {"isa_avx2.cpp": AVX2, "isa_avx512.cpp": AVX512}
FLAGS = ("-std=gnu++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-maybe-uninitialized",
         "-DDMOE_ONNXRUNTIME_CPU")  # GCC's own intrinsics headers trip maybe-uninitialized
NO_COMPILER, NO_HEADERS = "no C++ compiler (apt-get install g++)", "no headers of ONNX Runtime"


def headers() -> ModuleType:
    """../onnxruntime/headers.py; plugins/ is no package."""
    path = HERE.parent / "onnxruntime" / "headers.py"
    spec = importlib.util.spec_from_file_location("dmoe_headers", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(out: Path, sanitize: bool = False) -> None:
    """Compile in a temporary folder, then put the library in place; raises RuntimeError with what is missing."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if not compiler:
        raise RuntimeError(NO_COMPILER)
    module = headers()
    try:
        include = module.onnxruntime_headers()
    except module.HeadersError as error:
        raise RuntimeError(f"{NO_HEADERS}: {error}") from error
    extra = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover") if sanitize else ("-O3",)
    includes = ("-I", HERE, "-I", HERE.parent / "kernels", "-isystem", include)
    with tempfile.TemporaryDirectory() as folder:
        def compile_one(source: str) -> Path:
            target = Path(folder) / f"{Path(source).stem}.o"
            run(compiler, *FLAGS, *extra, *SOURCES[source], *includes, "-c", HERE / source, "-o", target)
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, SOURCES))
        partial = out.with_name(f".{out.name}.partial")  # a program that has the old one mapped keeps it
        out.parent.mkdir(parents=True, exist_ok=True)
        linked = () if sanitize else ("-static-libstdc++", "-static-libgcc", "-s", "-Wl,--no-undefined")
        run(compiler, "-shared", *extra, *objects, *linked, "-Wl,--exclude-libs,ALL",
            f"-Wl,--version-script={HERE.parent / 'onnxruntime' / 'exports.map'}", "-o", partial)
        partial.replace(out)


def run(*command: str | Path) -> None:
    """Run a command; raises RuntimeError with the end of what it printed."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stderr[-4000:]}")


def main() -> None:
    """Build and install; exit code 3 when compiler or headers are missing, 0 if that is `--optional`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--optional", action="store_true", help="going without, for want of tools, is no failure")
    parser.add_argument("--sanitize", action="store_true", help="address and undefined-behaviour sanitizers")
    parser.add_argument("--out", type=Path, default=INSTALLED)
    arguments, start = parser.parse_args(), time.perf_counter()
    try:
        build(arguments.out, arguments.sanitize)
    except RuntimeError as error:
        tools_missing = str(error).startswith((NO_COMPILER, NO_HEADERS))
        instead = "; going on with ONNX Runtime's own op" if tools_missing and arguments.optional else ""
        print(f"[cpu-ops] not built: {error}{instead}", file=sys.stderr)
        sys.exit(1 if not tools_missing else 0 if arguments.optional else 3)
    size = arguments.out.stat().st_size
    print(f"[cpu-ops] {arguments.out}: {size / 1e3:.0f} kB, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
