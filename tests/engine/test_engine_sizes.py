"""Engines of a model of published size: two layers of LLaDA2.0-mini with synthetic weights."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from engine_helpers import RTX_TARGETS, plugin_library

from dmoe_export import export_checkpoint
from dmoe_export.checkpoint.synthetic import GEOMETRIES, write_synthetic
from dmoe_export.engine.plugins import NAMES

pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed (pip install '.[rtx]')")


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    """3 GB, removed at the end."""
    folder = tmp_path_factory.mktemp("mini")
    write_synthetic(folder / "checkpoint", GEOMETRIES["llada2.0-mini"] | {"num_hidden_layers": 2}, dtype=torch.float16)
    bundle = export_checkpoint(folder / "checkpoint", folder / "bundle", precision="fp16", compute="fp16",
                               routing="top_p")
    shutil.rmtree(folder / "checkpoint")
    yield bundle
    shutil.rmtree(folder)


# The peak of the process image itself: ru_maxrss would start from the size of the process that forked.
_BUILD = """
import re, sys
from dmoe_export.cli import main
main(["build", *sys.argv[1:]], standalone_mode=False)
print(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_four_targets_with_little_memory(mini):
    plugin_library()
    done = subprocess.run([sys.executable, "-c", _BUILD, str(mini.folder), "--verify", "sizes", "--json"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report, peak = done.stdout.splitlines()
    (engine,) = json.loads(report)["engines"]
    assert engine["targets"] == RTX_TARGETS
    assert engine["plugin_nodes"] == sum(op.count for op in mini.manifest.denoiser.ops if op.name in NAMES) == 8
    experts = mini.manifest.experts
    outside = [w["bytes"] for w in engine["weight_inputs"] if w["file"] == experts.file]
    assert sum(outside) == 256 * experts.bytes_per_expert
    assert engine["bytes"] < 0.3e9 and sum(f.size for f in mini.manifest.files) > 2.9e9
    assert int(peak) * 1024 < 2e9
