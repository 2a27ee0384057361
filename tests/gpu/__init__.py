"""Checks for an NVIDIA GPU. They share `gpu_common` with the benchmarks."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
