"""Exports stream: peak memory does not follow the size of the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "export_memory.py"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_export_of_real_layers_stays_small(tmp_path):
    """Two layers of LLaDA2.0-mini's size: 6 GB in float32. (Four layers: `make bench-export`.)"""
    result = subprocess.run([sys.executable, BENCHMARK, "--layers", "2", "--work", tmp_path / "work"], text=True,
                            capture_output=True, check=True)
    measured = json.loads(result.stdout)
    assert measured["bundle_bytes"] > 5e9
    assert measured["export"]["peak_rss_bytes"] < 2 << 30
