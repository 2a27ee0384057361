"""Build libdmoe_onnxruntime.so without a GPU, and put it where the package finds it (`make ort-ops`).

    python plugins/onnxruntime/build.py [--code 80,90] [--jobs N]

Standard library only. Compiler and build folder are those of ../build.py, so kernels that `make plugins` has compiled
are not compiled again; the headers are found or fetched by headers.py.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
LIBRARY = "libdmoe_onnxruntime.so"


def load(path: Path) -> ModuleType:
    """A script as a module; plugins/ is no package."""
    spec = importlib.util.spec_from_file_location(f"dmoe_{path.parent.name}_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Configure, build the one target, install into the package."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--code", help="compute capabilities to compile for, such as 80,90 [all of CMakeLists.txt]")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    start, plugins, headers = time.perf_counter(), load(HERE.parent / "build.py"), load(HERE / "headers.py")
    try:
        include = headers.onnxruntime_headers()
    except headers.HeadersError as error:
        sys.exit(f"[ort-ops] {error}")
    plugins.WORK.mkdir(exist_ok=True)
    folder = plugins.WORK / "plugins"
    options = [f"-DCMAKE_CUDA_COMPILER={plugins.cuda_compiler()}", "-DDMOE_CUDA=ON",
               f"-DDMOE_ONNXRUNTIME_INCLUDE={include}", f"-DCMAKE_MAKE_PROGRAM={plugins.tool('ninja')}"]
    if arguments.code:
        options.append(f"-DDMOE_CUDA_CODE={arguments.code.replace(',', ';')}")
    cmake = plugins.tool("cmake")
    plugins.run(cmake, "-S", plugins.ROOT / "plugins", "-B", folder, "-G", "Ninja", *options, stdout=subprocess.DEVNULL)
    plugins.run(cmake, "--build", folder, "--target", "dmoe_onnxruntime", "--parallel", str(arguments.jobs))
    plugins.INSTALL.mkdir(exist_ok=True)
    partial = plugins.INSTALL / f".{LIBRARY}.partial"  # a program that has the old one mapped keeps it
    shutil.copy2(next(folder.rglob(LIBRARY)), partial)
    partial.replace(plugins.INSTALL / LIBRARY)
    size = (plugins.INSTALL / LIBRARY).stat().st_size
    print(f"[ort-ops] {plugins.INSTALL / LIBRARY}: {size / 1e6:.1f} MB, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
