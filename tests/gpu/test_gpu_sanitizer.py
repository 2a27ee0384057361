"""The kernels under compute-sanitizer: no access out of bounds, no race, no unwritten memory, no barrier misuse.

Each tool is a test of its own (`-k memcheck`), as each may take most of a step's time; its seconds are a finding.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

DRIVER = Path(__file__).parent / "sanitizer_driver.py"
FOUND = 9  # our exit code for "the sanitizer found something"
# What the tool says when it cannot work on this machine (in some sandboxes), which is no finding about the kernels.
UNSUPPORTED = ("Device not supported", "Unable to attach", "InjectionError")


def _tool() -> str | None:
    found = shutil.which("compute-sanitizer")
    beside = Path("/usr/local/cuda/bin/compute-sanitizer")
    return found or (str(beside) if beside.is_file() else None)


@pytest.mark.parametrize("check", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_sanitizer_finds_nothing(library, device, found, check):
    tool = _tool()
    if tool is None:
        pytest.skip("compute-sanitizer is not on the PATH; it comes with the CUDA toolkit")
    options = ["--tool", check, "--error-exitcode", str(FOUND)]
    if check == "memcheck":
        options += ["--leak-check", "no"]
    start = time.perf_counter()
    try:
        run = subprocess.run([tool, *options, sys.executable, str(DRIVER), "--library", str(library)], text=True,
                             capture_output=True, timeout=500, check=False)
    except subprocess.TimeoutExpired as error:
        found(f"sanitizer {check}", {"exit": None, "seconds": error.timeout, "said": str(error.stdout)[-300:]})
        raise
    seconds = time.perf_counter() - start
    text = run.stdout + run.stderr
    unsupported = next((line.strip() for line in text.splitlines() if any(u in line for u in UNSUPPORTED)), None)
    if run.returncode and unsupported and "calls were fine" not in text:
        found(f"sanitizer {check}", f"cannot run here: {unsupported}")
        pytest.skip(f"compute-sanitizer cannot run on this machine: {unsupported}")
    errors = [line for line in text.splitlines() if "ERROR SUMMARY" in line or "RACECHECK SUMMARY" in line]
    found(f"sanitizer {check}", {"exit": run.returncode, "seconds": seconds, "summary": errors})
    assert run.returncode == 0, text[-4000:]
    assert "calls were fine" in run.stdout and errors, text[-2000:]
