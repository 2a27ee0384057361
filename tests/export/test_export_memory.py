"""Exports stream: peak memory does not follow the size of the model."""

from __future__ import annotations

import pytest
from bench_helpers import bench_json


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_export_of_real_layers_stays_small(tmp_path):
    """Two layers of LLaDA2.0-mini's size: 6 GB in float32. (Four layers: `make bench-export`.)"""
    measured = bench_json("export", "--layers", 2, "--work", tmp_path)
    assert measured["bundle_bytes"] > 5e9
    assert measured["export"]["peak_rss_bytes"] < 2 << 30
