"""Build libdmoe_plugins.so without a GPU and without TensorRT, and put it where the package finds it (`make plugins`).

    python plugins/build.py [--code 80,90] [--jobs N]

Standard library only. What is missing is fetched from the package index: CUDA's compiler and the TensorRT headers into
build/, cmake and ninja into the running environment.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK, INSTALL = ROOT / "build", ROOT / "dmoe_export" / "lib"
CUDA_PACKAGE = "cuda-toolkit[nvcc,cudart,cccl,crt,nvvm]==13.*"
HEADER_PACKAGE = "kernel-lens==2.0.1"  # carries the Apache-2.0 headers of TensorRT 10.14
HEADER_FOLDERS = ("/usr/include/x86_64-linux-gnu", "/usr/include/aarch64-linux-gnu", "/usr/include",
                  "/usr/local/tensorrt/include", "/opt/tensorrt/include")


def say(text: str) -> None:
    """One line of what is going on."""
    print(f"[plugins] {text}", flush=True)


def run(*command: str | Path, **options: object) -> None:
    """Run a command; its failure ends this program with its output shown."""
    done = subprocess.run([str(c) for c in command], **options)  # type: ignore[call-overload]
    if done.returncode:
        sys.exit(f"[plugins] failed with exit code {done.returncode}: {' '.join(map(str, command))}")


def pip(*arguments: str | Path) -> None:
    """Pip of the running environment."""
    run(sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments)


def tool(name: str) -> str:
    """A build tool on the path, else installed from the package index."""
    beside = Path(sys.executable).parent / name
    found = shutil.which(name) or (str(beside) if beside.is_file() else None)
    if found:
        return found
    say(f"{name} is not on the path: installing it with pip")
    pip("install", name)
    return str(beside)


def cuda_compiler() -> Path:
    """nvcc of this machine, else of the package index, in build/cuda."""
    found = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if not found and Path("/usr/local/cuda/bin/nvcc").is_file():
        found = "/usr/local/cuda/bin/nvcc"
    if found:
        return Path(found)
    folder = WORK / "cuda"
    compilers = list(folder.glob("nvidia/*/bin/nvcc"))
    if not compilers:
        say(f"no nvcc on the path: fetching {CUDA_PACKAGE}")
        pip("install", "--target", folder, CUDA_PACKAGE)
        compilers = list(folder.glob("nvidia/*/bin/nvcc"))
    toolkit = compilers[0].parent.parent
    if (toolkit / "lib").is_dir() and not (toolkit / "lib64").exists():
        (toolkit / "lib64").symlink_to("lib")  # where nvcc and CMake look
    return compilers[0]


def tensorrt_headers() -> Path:
    """The folder of NvInfer.h: an installed TensorRT's, else the package index's, in build/tensorrt."""
    named = os.environ.get("TENSORRT_INCLUDE")
    for folder in (named,) if named else HEADER_FOLDERS:
        if (Path(folder) / "NvInfer.h").is_file():
            return Path(folder)
    if named:
        sys.exit(f"[plugins] TENSORRT_INCLUDE={named} has no NvInfer.h")
    target = WORK / "tensorrt"
    if not list(target.rglob("NvInfer.h")):
        say(f"no installed TensorRT: fetching the headers in {HEADER_PACKAGE}")
        target.mkdir(parents=True, exist_ok=True)
        pip("download", "--no-deps", "--dest", target, HEADER_PACKAGE)
        with zipfile.ZipFile(next(target.glob("*.whl"))) as wheel:
            wheel.extractall(target, [n for n in wheel.namelist() if "/tensorrt/" in n and n.endswith(".h")])
    return next(target.rglob("NvInfer.h")).parent


def main() -> None:
    """Configure, build, install into the package."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--code", help="compute capabilities to compile for, such as 80,90 [all of CMakeLists.txt]")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    start = time.perf_counter()
    WORK.mkdir(exist_ok=True)
    nvcc, headers, folder = cuda_compiler(), tensorrt_headers(), WORK / "plugins"
    say(f"nvcc: {nvcc}; TensorRT headers: {headers}")
    options = [f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DDMOE_TENSORRT_INCLUDE={headers}", "-DDMOE_CUDA=ON",
               f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
    if arguments.code:
        options.append(f"-DDMOE_CUDA_CODE={arguments.code.replace(',', ';')}")
    cmake = tool("cmake")
    run(cmake, "-S", ROOT / "plugins", "-B", folder, "-G", "Ninja", *options, stdout=subprocess.DEVNULL)
    run(cmake, "--build", folder, "--parallel", str(arguments.jobs))
    INSTALL.mkdir(exist_ok=True)
    for name in ("libdmoe_plugins.so", "libtensorrt_rtx.so"):
        built = next(folder.rglob(name))
        partial = INSTALL / f".{name}.partial"  # a program that has the old one mapped keeps it
        shutil.copy2(built, partial)
        partial.replace(INSTALL / name)
        say(f"{INSTALL / name}: {built.stat().st_size / 1e6:.1f} MB")
    say(f"done in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
