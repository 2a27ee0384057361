"""Engines of a model of published size: two layers of LLaDA2.0-mini with synthetic weights."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from engine_helpers import RTX_TARGETS, plugin_library

from dmoe_export import export_checkpoint
from dmoe_export.checkpoint.synthetic import GEOMETRIES, write_synthetic

pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed (pip install '.[rtx]')")


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    """3 GB, removed at the end."""
    folder = tmp_path_factory.mktemp("mini")
    write_synthetic(folder / "checkpoint", GEOMETRIES["llada2.0-mini"] | {"num_hidden_layers": 2}, dtype=torch.float16)
    bundle = export_checkpoint(folder / "checkpoint", folder / "bundle", precision="fp16")
    shutil.rmtree(folder / "checkpoint")
    yield bundle
    shutil.rmtree(folder)


@pytest.mark.timeout(600)
def test_four_targets_with_little_memory(mini):
    plugin_library()
    command = [sys.executable, "-m", "dmoe_export", "build", str(mini.folder), "--verify", "sizes", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        output = run.stdout.read()
        _, status, usage = os.wait4(run.pid, 0)
        run.returncode = os.waitstatus_to_exitcode(status)
    assert run.returncode == 0
    (engine,) = json.loads(output)["engines"]
    assert engine["targets"] == RTX_TARGETS
    assert engine["plugin_nodes"] == sum(op.count for op in mini.manifest.denoiser.ops) == 2
    experts = mini.manifest.experts
    assert sum(w["bytes"] for w in engine["weight_inputs"] if w["file"] == experts.file) == 256 * experts.bytes_per_expert
    assert engine["bytes"] < 0.3e9 and sum(f.size for f in mini.manifest.files) > 2.9e9
    assert usage.ru_maxrss * 1024 < 2e9
