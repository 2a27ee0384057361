"""Our two libraries for one GPU generation: built into a folder of their own, and checked before they are trusted.

    python benchmarks/device/libraries.py build FOLDER [--code 90]    build them (needs nvcc, cmake and ninja)
    python benchmarks/device/libraries.py check FOLDER [--code 90]    exit code 1 and one sentence if they do not fit
    python benchmarks/device/libraries.py headers FOLDER              a copy of TensorRT's headers, which building needs

Standard library only. `build` leaves libdmoe_plugins.so, libdmoe_onnxruntime.so, libtensorrt_rtx.so and made_from.json:
hashes of all sources, and the compute capability. The custom-op library shows nothing but its entry point, so that file
is how to know what it was built from.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = ROOT / "plugins"
ENTRY_POINTS = {"libdmoe_plugins.so": "dmoe_build_id", "libdmoe_onnxruntime.so": "RegisterCustomOps"}
RTX = "libtensorrt_rtx.so"  # stands in for a name only, see plugins/tensorrt/rtx_stub
MADE_FROM = "made_from.json"
_SOURCES = {".cu", ".cuh", ".h", ".cpp", ".cmake", ".map", ".txt"}


class LibrariesError(Exception):
    """They are not there, or not what these sources make; one sentence."""


def sources() -> dict[str, str]:
    """Hash of every file that the libraries are made of."""
    parts = ("kernels", "tensorrt", "onnxruntime", "cmake", "CMakeLists.txt")
    files = (path for part in parts for path in (PLUGINS / part, *sorted((PLUGINS / part).rglob("*"))))
    return {path.relative_to(PLUGINS).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in files if path.is_file() and path.suffix in _SOURCES}


def check(folder: Path, code: int) -> str:
    """The build id. Raises LibrariesError when one is missing, of other sources, for another GPU, or no library."""
    try:
        made_from = json.loads((folder / MADE_FROM).read_text())
    except (OSError, ValueError):
        raise LibrariesError(f"{folder} has no {MADE_FROM}: nobody knows what its libraries were built from.") from None
    now, then = sources(), made_from.get("sources", {})
    if changed := sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name)):
        raise LibrariesError(f"{folder} was built from other sources: {', '.join(changed[:3])} "
                             f"({len(changed)} of {len(now)} files differ).")
    if made_from.get("code") != code:
        raise LibrariesError(f"{folder} was built for compute capability {made_from.get('code')}, not {code}.")
    for name, entry in ENTRY_POINTS.items():
        try:
            library = ctypes.CDLL(str(folder / name))
            getattr(library, entry)
        except (OSError, AttributeError) as error:
            raise LibrariesError(f"{folder / name} cannot be used: {error}.") from None
        if entry == "dmoe_build_id":
            library.dmoe_build_id.restype = ctypes.c_char_p
            build = library.dmoe_build_id().decode()
    if build != made_from["build"]:
        raise LibrariesError(f"{folder / 'libdmoe_plugins.so'} says it is build {build}, {MADE_FROM} says "
                             f"{made_from['build']}.")
    return build


def build(out: Path, code: int) -> str:
    """Configure, build, copy; the build id. Raises LibrariesError."""
    folder, before = configure(code), sources()
    _cmake("--build", folder)
    if before != sources():
        raise LibrariesError("A source changed while the libraries were built; build them again.")
    out.mkdir(parents=True, exist_ok=True)
    for name in (*ENTRY_POINTS, RTX):
        partial = out / f".{name}.partial"  # a program that has the old one mapped keeps it
        shutil.copy2(folder / name, partial)
        partial.replace(out / name)
    header = (folder / "generated" / "dmoe_build_id.h").read_text()
    made_from = {"code": code, "build": header.split('"')[1], "sources": before}
    (out / MADE_FROM).write_text(json.dumps(made_from, indent=1) + "\n")
    return check(out, code)


def configure(code: int) -> Path:
    """The folder of a build for one compute capability; fetches what is missing. Raises LibrariesError."""
    folder = ROOT / "build" / f"cuda-{code}"
    _cmake("-S", PLUGINS, "--preset", "cuda", "-B", folder, f"-DDMOE_CUDA_CODE={code}", "-DDMOE_CUDA_PTX=")
    return folder


def copy_headers(out: Path, code: int) -> None:
    """TensorRT's, into out/tensorrt. Raises LibrariesError."""
    cache = (configure(code) / "CMakeCache.txt").read_text()
    shutil.rmtree(out / "tensorrt", ignore_errors=True)
    (out / "tensorrt").mkdir(parents=True)
    for header in Path(re.findall(r"^DMOE_TENSORRT_INCLUDE:\w+=(.*)", cache, re.MULTILINE)[0]).glob("*.h"):
        shutil.copy2(header, out / "tensorrt")


def _cmake(*arguments: str | Path) -> None:
    paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    try:
        done = subprocess.run(["cmake", *map(str, arguments)], env={**os.environ, "PATH": paths}, capture_output=True,
                              text=True, check=False)
    except FileNotFoundError:
        raise LibrariesError("CMake is not installed.") from None
    if done.returncode:
        print(done.stdout[-4000:], done.stderr[-4000:], sep="\n")
        raise LibrariesError(f"cmake failed with exit code {done.returncode}; its output is above.")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["build", "check", "headers"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--code", type=int, default=90, help="compute capability, such as 90 [90]")
    chosen = parser.parse_args()
    try:
        if chosen.verb == "headers":
            copy_headers(chosen.folder, chosen.code)
            return
        done = (build if chosen.verb == "build" else check)(chosen.folder, chosen.code)
    except LibrariesError as problem:
        print(f"[libraries] {problem}", file=sys.stderr)
        raise SystemExit(1) from None
    size = sum((chosen.folder / name).stat().st_size for name in ENTRY_POINTS)
    print(f"[libraries] {chosen.folder}: build {done} for compute capability {chosen.code}, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
