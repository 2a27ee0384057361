"""The unpacked onnxruntime-gpu opens a bundle on its CUDA provider, with our custom ops, on stubs of CUDA's libraries.

    python benchmarks/device/on_stubs.py STUBS.json BUNDLE FOLDER

STUBS.json: what tests/cuda_stubs/prepare.py printed. FOLDER gets what was found: by drive.py there, and by
gpu_generate.py and gpu_profile.py with that provider. Kernels do nothing on stubs, so this says that slimming, packing
and unpacking left a provider that takes the graph and has all kernels it launches; nothing of results. Exit code 1
when it does not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from slim_onnxruntime import UNREACHED  # noqa: E402

CUDA = "CUDAExecutionProvider"


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("stubs", "bundle", "folder"):
        parser.add_argument(name, type=Path)
    chosen = parser.parse_args()
    environment = {**os.environ, **json.loads(chosen.stubs.read_text())}
    chosen.folder.mkdir(parents=True, exist_ok=True)
    driven = chosen.folder / "driven.json"
    for command in (["cuda_stubs/drive.py", chosen.bundle, "--out", driven],
                    ["gpu/generate_on_stubs.py", chosen.bundle, chosen.folder]):
        if subprocess.run([sys.executable, ROOT / "tests" / command[0], *command[1:]], env=environment).returncode:
            sys.exit(f"{command[0]} failed; what it said stands above.")
    found = json.loads(driven.read_text())
    runs = {**found["runs"], "drawing": found["drawing"], "batch": found["batch"]}
    kernels = {kernel for run in runs.values() for kernel in run["kernels"]}
    if dropped := [kernel for kernel in kernels if UNREACHED.search(kernel.encode())]:
        sys.exit(f"{len(dropped)} of {len(kernels)} launched kernels were not carried, such as {dropped[0]}")
    for name, run in runs.items():
        if not run["placement"].get(CUDA) or run["violations"]:
            sys.exit(f"{name}: nodes {run['placement']}, violations {run['violations']}")
    plain, recorded = found["runs"]["custom ops"], found["runs"]["custom ops, recorded"]["graphs"]
    ours, bodies = (found["runs"][name]["step"]["operations"] for name in ("custom ops", "bodies"))
    if recorded["off"] or not recorded["replayed"] or ours >= bodies:
        sys.exit(f"recorded steps: {recorded}; operations of a step: {ours} with custom ops, {bodies} with bodies")
    print(f"ONNX Runtime {found['onnxruntime']} on stubs: nodes {plain['placement']}, {ours} operations a step with "
          f"custom ops and {bodies} with bodies, {recorded['replayed']} steps replayed, "
          f"{len(kernels)} kernels, all of them carried")


if __name__ == "__main__":
    main()
