"""`check` passes what is right and names the layer of what is wrong, in float32 and float16, by numbers alone."""

from __future__ import annotations

from collections import Counter

import check_defects as defects
import pytest
from bundles import GOLDEN_GUARD
from conftest import SAMPLE

from dmoe_export.check.inputs import make_inputs
from dmoe_export.check.reference import Reference
from dmoe_export.check.run import check_bundle
from dmoe_export.check.sources import CheckpointWeights
from dmoe_export.checkpoint.family import Checkpoint


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def right(request, golden, golden_bundle, exported):
    if request.param == "fp32":
        return golden_bundle
    return exported(golden / "model", precision="fp16", compute="fp16", min_experts=GOLDEN_GUARD)


@pytest.fixture(scope="module")
def rare_expert(golden, golden_bundle):
    """Of layer 2: the expert that the fewest tokens of the check's inputs use, but at least one."""
    checkpoint, routing = Checkpoint(golden / "model"), golden_bundle.manifest.routing
    reference = Reference(CheckpointWeights(checkpoint), routing, keep=True)
    feed = make_inputs(checkpoint.description, routing, None, [], 0, 1 << 30).feeds[0].arrays()
    arrays, _ = reference.forward(feed, reference.backend.new_cache(len(feed["input_ids"])))
    used = Counter(arrays["expert_ids.2"][feed["position_ids"] >= 0].ravel().tolist())
    return min(used, key=lambda e: used[e] if e >= 0 else 1 << 30)


def failed(bundle, golden, layer, **options):
    """The numeric part alone finds the layer; weights are not looked at."""
    report = check_bundle(bundle.folder, golden / "model", weights=False, layers=3, **options)
    assert not report.passed and report.weights.compared is False
    assert report.identity.same is True
    assert report.first_bad_layer == layer and f"Layer {layer} is the first bad layer" in report.verdict
    backend = report.backends[0]
    assert [check.passed for check in backend.layers_alone[:layer + 1]] == [True] * layer + [False]
    return backend


def test_right_bundle_passes(right, golden):
    report = check_bundle(right.folder, golden / "model")
    assert report.passed, report.verdict
    assert report.identity.same and report.weights.passed and report.weights.compared
    assert report.first_bad_layer is None and report.reference_kind == "checkpoint"
    backend = report.backends[0]
    assert len(backend.layers_alone) == len(backend.layers_in_sequence) == report.layers_checked == 3
    assert all(check.router.unexplained == 0 for check in backend.layers_alone[1:])
    assert len(backend.generations) == 3 and all(g.reference_forwards > 2 for g in backend.generations)
    assert set(report.experts_exercised) == {1, 2} and min(report.experts_exercised.values()) >= GOLDEN_GUARD


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_sample_passes(precision, exported):
    bundle = exported(SAMPLE, precision=precision, compute=precision)
    report = check_bundle(bundle.folder, SAMPLE, prompts=["what is the sum of 3 4 5?"])
    assert report.passed, report.verdict
    assert report.inputs.source == "prompts"
    answers = {g.prompt: g for g in report.backends[0].generations}
    assert answers["what is the sum of 3 4 5?"].backend_text == "3 + 4 + 5 = 12"
    assert answers["what is the capital of france?"].first_difference is None


def test_perturbed_expert(right, golden, rare_expert, tmp_path):
    bundle = defects.tampered(right, tmp_path / "b", lambda folder, manifest: defects.perturbed_expert(
        folder, manifest, 2, rare_expert))
    backend = failed(bundle, golden, 2)
    assert backend.first_bad_part == "layer 2 alone, feed-forward"


def test_swapped_gate_and_up(right, golden, tmp_path):
    failed(defects.tampered(right, tmp_path / "b", defects.swapped_gate_and_up), golden, 1)


def test_missing_expert_bias(right, golden, tmp_path):
    backend = failed(defects.tampered(right, tmp_path / "b", defects.missing_expert_bias), golden, 2)
    assert backend.layers_alone[2].router.unexplained > 0 and "routing rule" in backend.layers_alone[2].reason


def test_wrong_scaling(right, golden, tmp_path):
    backend = failed(defects.tampered(right, tmp_path / "b", defects.wrong_scaling), golden, 1)
    assert backend.first_bad_part == "layer 1 alone, feed-forward"


def test_shared_expert_twice(right, golden, tmp_path):
    failed(defects.tampered(right, tmp_path / "b", defects.shared_expert_twice), golden, 2)


def test_rotary_on_all_dims(right, golden, tmp_path):
    assert right.manifest.model.rotary_dim < right.manifest.model.head_dim
    bundle = defects.tampered(right, tmp_path / "b", defects.rotary_on_all_dims)
    assert failed(bundle, golden, 0).first_bad_part == "layer 0 alone, key"


def test_block_length_of_16(right, golden, tmp_path):
    bundle = defects.tampered(right, tmp_path / "b", defects.block_length_16)
    assert bundle.manifest.routing.block_length == 32
    assert failed(bundle, golden, 0).first_bad_part == "layer 0 alone, attention"


def test_graph_defects_show_without_a_checkpoint(golden_bundle, tmp_path):
    bundle = defects.tampered(golden_bundle, tmp_path / "b", defects.wrong_scaling)
    report = check_bundle(bundle.folder)
    assert (report.reference_kind, report.first_bad_layer, report.passed) == ("bundle weights", 1, False)
    backend = report.backends[0]
    assert any(g.first_difference is not None and not g.near_tie for g in backend.generations)
    assert any(gate.where == "tokens" and not gate.passed for gate in backend.gates)
