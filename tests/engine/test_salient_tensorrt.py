"""Engines of the salient graphs of static shapes, built by TensorRT-RTX without a GPU; nothing here runs one."""

from __future__ import annotations

import re
import shutil

import pytest
from engine_helpers import RTX_TARGETS, built, dmoe, plugin_library

from dmoe_export.bundle.engine_entries import EngineEntry
from dmoe_export.bundle.reader import Bundle, open_bundle
from dmoe_export.check.engines import check_engines
from dmoe_export.engine.plan import read_plan

pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed (pip install '.[rtx]')")

GRAPHS = [None, "denoiser.salient.fill.onnx", "denoiser.salient.4.onnx", "denoiser.salient.16.onnx"]


@pytest.fixture(scope="module")
def bundle(salient_block, tmp_path_factory) -> Bundle:
    """Block diffusion in fp32 with engines of all its graphs: routing in our plugin, experts in standard ops."""
    plugin_library()
    folder = tmp_path_factory.mktemp("e") / "b"
    shutil.copytree(salient_block.folder, folder)
    built(folder, "--targets", "sm89", "--experts-op", "onnx", "--max-context", "256")
    return open_bundle(folder)


def check_set(bundle: Bundle) -> None:
    """Engines of one build: all share the inputs of experts and vocabulary, all custom nodes are plugins."""
    first = bundle.manifest.engines[0]
    for entry in bundle.manifest.engines:
        assert {w.name: w for w in entry.weight_inputs} == {w.name: w for w in first.weight_inputs} != {}
        assert entry.expert_pools == first.expert_pools
        assert entry.plugin_nodes >= len(bundle.manifest.model.moe_layers) and entry.fallback_nodes == 0
    for check in check_engines(bundle):
        assert check.passed, [finding.detail for finding in check.findings if finding.passed is False]
        assert {f.name for f in check.findings if f.passed} >= {"plugins", "inputs and outputs", "profiles", "weights"}


def test_one_command_builds_all_of_them(bundle):
    assert [entry.graph for entry in bundle.manifest.engines] == GRAPHS
    assert bundle.manifest.engines[2].file == "denoiser.salient.4.tensorrt-rtx.sm89.engine"
    check_set(bundle)


def test_profiles_take_the_steps_of_a_block(bundle):
    """One sequence, and as many tokens as a graph lists at least."""
    block = bundle.manifest.routing.block_length
    for entry, least in zip(bundle.manifest.engines[1:], (1, 4, 16), strict=True):
        (profile,) = entry.profiles
        assert (profile.name, profile.batch, profile.tokens) == ("salient", (1, 1, 1), (least, block, 2 * block))
        assert profile.past == (1, 64, 256) and profile.rows == (1, block, block)
        (ranges,) = read_plan(bundle.folder / entry.file).profiles
        assert ranges["input_ids"] == ((1, least), (1, block), (1, 2 * block))
        if least > 1:
            assert ranges["range_context.0"][0][:2] == (1, least) and ranges["unmasked"] == ranges["input_ids"]


@pytest.mark.parametrize(("graph", "finding", "sentence"), [
    (GRAPHS[1], "inputs and outputs", "it has a further input range_|it has a further input unmasked|threshold"),
    (GRAPHS[3], "profiles", r"profile salient has \[1, 4\] as least shape of input_ids, the manifest says \[1, 16\]"),
])
def test_check_finds_the_engine_of_another_graph(bundle, graph, finding, sentence):
    """That of 4 rows where the manifest has one of all rows, or of 16."""
    other = next(entry for entry in bundle.manifest.engines if entry.graph == graph)
    entry = other.model_copy(update={"file": bundle.manifest.engines[2].file})
    (check,) = check_engines(Bundle(bundle.folder, bundle.manifest.model_copy(update={"engines": [entry]})))
    found = {f.name: f for f in check.findings}[finding]
    assert found.passed is False and re.search(sentence, found.detail), found.detail


def test_a_full_canvas_and_its_profile(salient_llada, tmp_path):
    """A dense model, float32: steps cover prompt and answer, and there are no plugins but none is missing."""
    folder = shutil.copytree(salient_llada.folder, tmp_path / "b")
    found = [EngineEntry.model_validate({k: v for k, v in engine.items() if k not in ("bytes", "seconds")})
             for engine in built(folder, "--targets", "sm89", "--max-context", "128")["engines"]]
    fill, fixed = found[1:]
    assert fill.profiles[0].tokens == (1, 128, 128) and fixed.profiles[0].tokens == (8, 128, 128)
    assert fixed.network.layers["TOPK"] and "NON_ZERO" not in fixed.network.layers and not fixed.plugin_nodes


def test_the_denoiser_alone(bundle):
    """A dry run says what would be built; experts inside each engine are refused."""
    alone = ("--no-salient",)
    for options, graphs in (((), GRAPHS), (alone, [None]), ((*alone, "--experts", "inline"), [None])):
        planned = built(bundle.folder, "--experts-op", "onnx", "--targets", "sm89", "--dry-run", *options)["engines"]
        assert [engine["graph"] for engine in planned] == graphs
    result = dmoe("build", bundle.folder, "--experts", "inline", "--experts-op", "onnx", "--dry-run")
    assert result.exit_code == 2
    assert "--experts inline would put all experts into each of 4 engines" in result.stderr
    assert "--no-salient" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("experts", ["external", "resident"])
def test_half_precision_for_four_targets(salient_half_sample, tmp_path, experts):
    """Router and mixture are plugins in all graphs, slot pools inputs of all."""
    plugin_library()
    folder = shutil.copytree(salient_half_sample.folder, tmp_path / "b")
    built(folder, "--experts", experts)
    bundle = open_bundle(folder)
    check_set(bundle)
    layers = len(bundle.manifest.model.moe_layers)
    for entry in bundle.manifest.engines:
        assert entry.targets == RTX_TARGETS and entry.plugin_nodes >= 2 * layers
        assert len(entry.expert_pools) == (layers if experts == "resident" else 0)
    assert len(bundle.manifest.engines) == 4
