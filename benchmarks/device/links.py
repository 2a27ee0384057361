"""Does ONNX Runtime's CUDA provider find every function it wants in the CUDA libraries of this Python's packages?

    python benchmarks/device/links.py libonnxruntime_providers_cuda.so

Asked of the real libraries, without loading them: needs no driver and no GPU. cuDNN, which the provider opens at run
time, is asked for the functions whose names stand in the provider. Exit code 1 and a sentence when one is missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "cuda_stubs"))

from build import cudnn_names, undefined  # type: ignore[import-not-found]


def defined(*libraries: Path) -> set[str]:
    """Functions that libraries bring."""
    listed = _run("nm", "-D", "--defined-only", *libraries)
    return {line.split()[-1].partition("@")[0] for line in listed.splitlines() if len(line.split()) == 3}


def needed(library: Path) -> set[str]:
    """Files it cannot be loaded without, the driver's left out."""
    files = re.findall(r"NEEDED\)\s+Shared library: \[(lib(?:cu|nv)[^]]+)\]", _run("readelf", "-d", library))
    return {file for file in files if not file.startswith("libcuda.")}


def _run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def missing(provider: Path) -> tuple[list[str], int]:
    """A clause per library that lacks something, and how many functions were found."""
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(root) for root in (spec.submodule_search_locations or ())] if spec else []
    names_of = undefined(provider)
    wanted = {file: names_of.get(file, set()) for file in needed(provider)}
    wanted["libcudnn.so.9"] = cudnn_names(provider)
    said, found = [], 0
    for file, names in sorted(wanted.items()):
        pattern = "libcudnn*.so.9" if file.startswith("libcudnn") else file
        libraries = [path for root in roots for path in root.glob(f"*/lib/{pattern}")]
        if lacking := sorted(names - defined(*libraries)) if libraries else ["everything: no package brings it"]:
            said.append(f"{file} lacks {', '.join(lacking[:5])} ({len(lacking)} in all)")
        found += len(names) - len(lacking)
    return said, found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("provider", type=Path)
    lacks, count = missing(parser.parse_args().provider)
    if lacks:
        sys.exit("; ".join(lacks))
    print(f"all {count} functions that the provider wants are in this Python's CUDA libraries")
