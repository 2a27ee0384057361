"""Engines with slot pools, built by TensorRT-RTX without a GPU, and what check makes of them."""

from __future__ import annotations

import re
import shutil

import pytest
from engine_helpers import built, dmoe, plugin_library

from dmoe_export.bundle.reader import Bundle, open_bundle
from dmoe_export.check.engines import check_engines
from dmoe_export.engine.plan import read_plan

pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed (pip install '.[rtx]')")


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint, exported, tmp_path_factory):
    """The tiny model in fp16 with an engine of each kind."""
    plugin_library()
    folder = tmp_path_factory.mktemp("e") / "tiny16"
    shutil.copytree(exported(tiny_checkpoint, precision="fp16", compute="fp16").folder, folder)
    for experts in ("external", "resident"):
        built(folder, "--targets", "sm89", "--experts", experts)
    return open_bundle(folder)


@pytest.fixture
def entry(bundle):
    return next(entry for entry in bundle.manifest.engines if entry.experts == "resident")


def test_both_engines_are_in_the_bundle(bundle, entry):
    plain, resident = bundle.manifest.engines
    assert plain.file == "denoiser.tensorrt-rtx.sm89.engine"
    assert resident.file == "denoiser.tensorrt-rtx.sm89.resident.engine"
    assert plain.weight_inputs == resident.weight_inputs and not plain.expert_pools
    assert len(resident.expert_pools) == len(bundle.manifest.model.moe_layers) and resident.fallback_nodes == 0


def test_the_plugins_have_a_table_and_a_pool(bundle, entry):
    """As TensorRT wrote it into the file: attribute, names, types, shapes and ranges."""
    plan = read_plan(bundle.folder / entry.file)
    experts = bundle.manifest.model.experts.num_experts
    found = [layer.attributes for layers in plan.plugins for layer in layers if layer.op == "DmoeMixture"]
    assert [attributes["residency"] for attributes in found] == [1] * 2 * len(entry.expert_pools)  # two profiles
    weights = {weight.name: weight for weight in entry.weight_inputs}
    for tensors, ranges in zip(plan.tensors, plan.profiles, strict=True):
        tensors = {tensor.name: tensor for tensor in tensors}
        for pool in entry.expert_pools:
            table = tensors[pool.slot_of_expert]
            assert (table.dtype, table.shape, table.is_input) == ("int32", (experts,), True)
            for slots, name in ((pool.gate_up_pool, pool.gate_up), (pool.down_pool, pool.down)):
                slab = tuple(weights[name].shape[1:])
                assert tensors[slots].dtype == "float16" and tensors[slots].shape == (-1, *slab)
                assert ranges[slots] == tuple((count, *slab) for count in (1, experts // 4, experts))
                assert tensors[name].shape == (experts, *slab)


def test_check_accepts_it(bundle):
    for check in check_engines(bundle):
        assert check.passed, [finding.detail for finding in check.findings if finding.passed is False]
        assert {f.name for f in check.findings if f.passed} >= {"plugins", "inputs and outputs", "profiles", "weights"}


@pytest.mark.parametrize(("which", "update", "finding", "sentence"), [
    (1, {"expert_pools": []}, "plugins", "has a slot pool, against the manifest"),
    (1, {"expert_pools": []}, "inputs and outputs", r"has a further input .*\.ffn\.(down|gate_up)\.pool"),
    (0, "of the other", "plugins", "lacks a slot pool, against the manifest"),
])
def test_check_finds_another_engine(bundle, which, update, finding, sentence):
    engines = bundle.manifest.engines
    update = {"expert_pools": engines[1].expert_pools} if isinstance(update, str) else update
    changed = Bundle(bundle.folder, bundle.manifest.model_copy(
        update={"engines": [engines[which].model_copy(update=update)]}))
    (check,) = check_engines(changed)
    (found,) = [f for f in check.findings if f.name == finding]
    assert found.passed is False
    assert re.search(sentence, found.detail), found.detail


@pytest.mark.parametrize(("options", "sentence"), [
    (("--experts-op", "onnx"), "--experts resident needs the experts plugin"),
    (("--allow-fallback",), "--experts resident needs the experts plugin"),
])
def test_what_makes_no_sense_is_refused(bundle, options, sentence):
    result = dmoe("build", bundle.folder, "--experts", "resident", "--dry-run", *options)
    assert result.exit_code == 2 and sentence in result.stderr


def test_dry_run_names_the_pools(bundle, tmp_path):
    copy = shutil.copytree(bundle.folder, tmp_path / "copy")
    (engine,) = built(copy, "--experts", "resident", "--targets", "sm80", "--dry-run")["engines"]
    assert engine["expert_pools"] and engine["file"].endswith("sm80.resident.engine")
    assert len(open_bundle(copy).manifest.engines) == 2
