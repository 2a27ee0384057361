"""Engines of the salient graphs of static shapes, built by TensorRT-RTX without a GPU; nothing here runs one."""

from __future__ import annotations

import re
import shutil

import pytest
from engine_helpers import RTX_TARGETS, built, dmoe, plugin_library

from dmoe_export.bundle.manifest import EngineEntry
from dmoe_export.bundle.reader import Bundle, open_bundle
from dmoe_export.check.engines import check_engines
from dmoe_export.engine.plan import read_plan

pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed (pip install '.[rtx]')")

GRAPHS = [None, "denoiser.salient.fill.onnx", "denoiser.salient.8.onnx", "denoiser.salient.24.onnx"]


@pytest.fixture(scope="module")
def bundle(salient_half_sample, tmp_path_factory) -> Bundle:
    """The sample in fp16 with engines of all its graphs, experts in slot pools."""
    plugin_library()
    folder = tmp_path_factory.mktemp("e") / "b"
    shutil.copytree(salient_half_sample.folder, folder)
    built(folder, "--targets", "sm89", "--experts", "resident", "--max-context", "256")
    return open_bundle(folder)


def test_one_command_builds_all_of_them(bundle):
    """All share the inputs of experts and vocabulary, and all custom nodes of all are plugins."""
    engines = bundle.manifest.engines
    assert [entry.graph for entry in engines] == GRAPHS
    assert engines[2].file == "denoiser.salient.8.tensorrt-rtx.sm89.resident.engine"
    layers, experts = bundle.manifest.model.num_layers, len(bundle.manifest.model.moe_layers)
    for entry in engines:
        assert entry.weight_inputs and entry.expert_pools == engines[0].expert_pools
        assert {w.name: w for w in entry.weight_inputs} == {w.name: w for w in engines[0].weight_inputs}
        assert entry.fallback_nodes == 0 and entry.plugin_nodes >= 2 * experts  # router and mixture
    assert engines[0].plugin_nodes > 3 * layers > engines[1].plugin_nodes  # attention is one of the denoiser's alone


def test_profiles_take_the_steps_of_a_block(bundle):
    """One sequence, and as many tokens as a graph lists at least."""
    block = bundle.manifest.routing.block_length
    for entry, least in zip(bundle.manifest.engines[1:], (1, 8, 24), strict=True):
        (profile,) = entry.profiles
        assert (profile.name, profile.batch, profile.tokens) == ("salient", (1, 1, 1), (least, block, 2 * block))
        assert profile.past == (1, 64, 256) and profile.rows == (1, block, block)
        (ranges,) = read_plan(bundle.folder / entry.file).profiles
        assert ranges["input_ids"] == ((1, least), (1, block), (1, 2 * block))
        if least > 1:
            assert ranges["range_context.0"][0][:2] == (1, least) and ranges["unmasked"] == ranges["input_ids"]


def test_check_knows_them(bundle):
    for check in check_engines(bundle):
        assert check.passed, [finding.detail for finding in check.findings if finding.passed is False]
        assert {f.name for f in check.findings if f.passed} >= {"plugins", "inputs and outputs", "profiles", "weights"}


@pytest.mark.parametrize(("graph", "finding", "sentence"), [
    (GRAPHS[1], "inputs and outputs", "it has a further input range_|it has a further input unmasked|threshold"),
    (GRAPHS[3], "profiles", r"profile salient has \[1, 8\] as least shape of input_ids, the manifest says \[1, 24\]"),
])
def test_check_finds_the_engine_of_another_graph(bundle, graph, finding, sentence):
    """That of 8 rows where the manifest has one of all rows, or of 24."""
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


def test_the_denoiser_alone(bundle, salient_block, tmp_path):
    """A dry run says what would be built; experts inside each engine are refused."""
    for options, graphs in (((), GRAPHS), (("--no-salient",), [None]), (("--no-salient", "--experts", "inline"), [None])):
        planned = built(bundle.folder, "--targets", "sm89", "--dry-run", *options)["engines"]
        assert [engine["graph"] for engine in planned] == graphs
    result = dmoe("build", bundle.folder, "--experts", "inline", "--dry-run")
    assert result.exit_code == 2
    assert "--experts inline would put all experts into each of 4 engines" in result.stderr
    assert "--no-salient" in result.stderr


@pytest.mark.slow
def test_four_targets(salient_half_sample, tmp_path):
    plugin_library()
    folder = shutil.copytree(salient_half_sample.folder, tmp_path / "b")
    engines = built(folder, "--experts", "external")["engines"]
    assert [engine["targets"] for engine in engines] == [RTX_TARGETS] * 4
    assert all(engine["plugin_nodes"] and not engine["fallback_nodes"] for engine in engines)
    assert all(check.passed for check in check_engines(open_bundle(folder)))
