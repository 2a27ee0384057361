"""An engine of a model with a canvas for four targets, built by TensorRT-RTX without a GPU; layers of two kinds."""

from __future__ import annotations

import shutil

import pytest
from engine_helpers import RTX_TARGETS, built, dmoe, plugin_library

from dmoe_export.bundle.reader import open_bundle
from dmoe_export.check.engines import check_engines
from dmoe_export.engine.plugins import plugin_ops

pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed (pip install '.[rtx]')")


@pytest.fixture(scope="module")
def bundle(golden, exported, tmp_path_factory):
    """The one whose forwards are recorded, to be changed."""
    half = exported(golden.parent / "diffusion_gemma" / "model", precision="fp16", compute="fp16")
    return shutil.copytree(half.folder, tmp_path_factory.mktemp("canvas") / "b")


def test_four_targets(bundle):
    """The canvas is the block; its inputs have sizes of their own; nothing became a body that has a plugin."""
    plugin_library()
    (engine,) = built(bundle, "--targets", ",".join(RTX_TARGETS), "--max-batch", 2)["engines"]
    assert engine["targets"] == RTX_TARGETS and engine["fallback_nodes"] == 0
    opened = open_bundle(bundle)
    wanted = plugin_ops("plugin", opened.manifest)
    nodes = opened.manifest.denoiser.nodes(wanted)
    assert engine["plugin_nodes"] == sum(count for op, count in nodes.items() if op in wanted) > 0
    prefill, denoise = engine["profiles"]
    assert denoise["tokens"] == [32, 32, 32] and denoise["rows"] == [1, 32, 32] and prefill["tokens"][0] == 32
    shapes = engine["network"]["profiles"][1]
    hidden = opened.manifest.model.hidden_size
    assert shapes["soft_embeddings"] == [[1, 32, hidden], [1, 32, hidden], [2, 32, hidden]]
    assert shapes["denoise"] == shapes["temperature"] == [[1], [1], [2]] and shapes["uniform"][2] == [2, 32]
    assert [shapes[f"past_key.{layer}"][0] for layer in range(3)] == [[1, 2, 1, 16], [1, 2, 1, 16], [1, 1, 1, 32]]
    types = {tensor["name"]: tensor["dtype"] for tensor in engine["network"]["inputs"]}
    assert types["denoise"] == "bool" and types["soft_embeddings"] == types["uniform"] == "float"
    outputs = {tensor["name"] for tensor in engine["network"]["outputs"]}
    assert {"sampled_ids", "entropy", "next_soft_embeddings"} <= outputs
    (found,) = check_engines(opened)
    assert found.passed, found.findings


def test_sizes_are_told_in_canvases(bundle):
    result = dmoe("build", bundle, "--targets", "sm89", "--max-prefill", 48)
    assert result.exit_code == 2 and "--max-prefill 48 is no multiple of the canvas length 32." in result.stderr
