"""Budgets as users write them."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from dmoe_export.cli import main
from dmoe_export.errors import RequestError
from dmoe_export.runtime.residency.backend import parse_interval
from dmoe_export.runtime.residency.budget import parse_bytes, plan_budget


@pytest.mark.parametrize("text, want", [
    ("4G", 4 << 30), ("4GiB", 4 << 30), ("1.5g", 3 << 29), ("512M", 512 << 20), ("10k", 10240), ("25%", 250),
    ("777", 777), (777, 777)])
def test_sizes(text, want):
    assert parse_bytes(text, 1000) == want


@pytest.mark.parametrize("text", ["-4G", "0", "-1", "much", "4X", "", "0%", "nan"])
def test_sizes_that_are_none(text):
    with pytest.raises(RequestError, match="Expert budget"):
        parse_bytes(text, 1000)


def test_residents_leave_a_reserve(sample_bundle):
    manifest = sample_bundle.manifest
    experts, layers, each = manifest.model.moe.num_experts, len(manifest.model.moe_layers), manifest.bytes_per_expert
    half = plan_budget(manifest, "50%")
    assert half.bytes == experts * layers * each // 2
    assert half.residents == int(half.bytes * 7 / 8) // (layers * each) < experts / 2
    assert plan_budget(manifest, "100%").residents == plan_budget(manifest, "300%").residents == experts
    eight = plan_budget(manifest, None, 8)
    assert eight.residents == 8 and plan_budget(manifest, eight.bytes).residents == 8
    assert plan_budget(manifest) is None


@pytest.mark.parametrize("arguments, sentence", [
    (("1k", None), "less than one coreset"), (("8000T", None), "more than this machine's memory"),
    (("-1G", None), "not positive"), ((None, 0), "between 2 and 32"), ((None, 10**6), "between 2 and 32"),
    ((None, -3), "between 2 and 32"), (("1G", 3), "not both"), ((None, 1), "an integer between 2 and 32"),
    ((None, 2.5), "is 2.5"), ((None, "8"), "is '8'"), (("9" * 400 + "G", None), "more than this machine")])
def test_budgets_that_make_no_sense(sample_bundle, arguments, sentence):
    with pytest.raises(RequestError, match=sentence):
        plan_budget(sample_bundle.manifest, *arguments)


def test_a_dense_model_has_nothing_to_budget(sample_bundle):
    manifest = sample_bundle.manifest
    dense = manifest.model_copy(update={"model": manifest.model.model_copy(update={"moe": None}), "experts": None})
    with pytest.raises(RequestError, match="dense"):
        plan_budget(dense, "1G")


def test_intervals():
    assert [parse_interval(value) for value in ("auto", "never", "4", 4)] == ["auto", "never", 4, 4]
    for bad in ("0", "-2", "often", 0, 1.5, None):
        with pytest.raises(RequestError, match="interval"):
            parse_interval(bad)


def test_inspect_predicts_memory(sample_bundle):
    command = ["inspect", str(sample_bundle.folder), "--verify", "sizes", "--json"]
    sizes = json.loads(CliRunner().invoke(main, [*command, "--expert-budget", "25%"]).output)["sizes"]
    dense = (sample_bundle.folder / "denoiser.onnx.data").stat().st_size
    assert sizes["predicted_weight_memory_bytes"] == dense + sizes["expert_bytes"] // 4
    assert sizes["resident_experts_per_layer"] == 7
    assert "predicted_weight_memory_bytes" not in json.loads(CliRunner().invoke(main, command).output)["sizes"]
    refused = CliRunner().invoke(main, [*command, "--expert-budget", "1k"])
    assert refused.exit_code == 2 and "less than one coreset" in refused.output
