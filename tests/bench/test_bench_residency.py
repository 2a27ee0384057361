"""bench residency: the sweep on the sample."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from dmoe_export.bench import residency_price
from dmoe_export.bench.residency import settings
from dmoe_export.cli import main
from dmoe_export.errors import RequestError


def test_settings_are_every_combination():
    chosen = settings(["off", "25%"], ["auto", "1"], ["token", "top_p", "top_p:0.4"], 32)
    assert len(chosen) == 3 * 3  # off has no interval
    assert [s.options for s in chosen[::3]] == [{"min_experts": 32}, {}, {"coreset_top_p": 0.4}]
    for bad in ("top_c", "top_p:x", "token:1"):
        with pytest.raises(RequestError, match="Routing"):
            settings(["1G"], ["1"], [bad], 32)


def test_command(sample_bundle, tmp_path):
    out, plot = tmp_path / "new" / "r.json", tmp_path / "r.png"
    done = CliRunner().invoke(main, [
        "bench", "residency", str(sample_bundle.folder), "--verify", "sizes", "--budget", "off,25%", "--interval",
        "auto,never", "--max-new-tokens", "32", "--rounds", "1", "--turns", "2", "--threads", "1", "--out",
        str(out), "--plot", str(plot), "--json"])
    assert done.exit_code == 0, done.output
    document = json.loads(out.read_text())
    assert document == json.loads(done.stdout)
    assert len(document["results"]) == 6 and all(r["same_tokens"] for r in document["results"])
    layers = len(sample_bundle.manifest.model.moe_layers)
    by = {(r["routing"], r["budget"], r["interval"]): r for r in document["results"]}
    assert by["token", "off", "–"]["hit_rate"] is None and by["token", "off", "–"]["peak_expert_bytes"] > 0
    assert by["token", "25%", "auto"]["unique_experts"] > by["top_p", "25%", "auto"]["unique_experts"]
    assert by["top_p", "25%", "never"]["promotions"] <= 7 * layers and by["top_p", "25%", "never"]["last_interval"] == 0
    prices = document["price"]
    assert [(p["routing"], p["beside_python"]) for p in prices] == [
        ("token", False), ("token", True), ("top_p", False), ("top_p", True)]
    assert prices[0]["unique_experts"] > prices[2]["unique_experts"] and all(0 < p["ratio"] < 50 for p in prices)
    assert prices[0]["without_seconds"]["count"] == 2
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_result_is_shown_though_it_cannot_be_written(sample_bundle):
    done = CliRunner().invoke(main, [
        "bench", "residency", str(sample_bundle.folder), "--verify", "sizes", "--budget", "off", "--interval", "1",
        "--max-new-tokens", "4", "--rounds", "1", "--turns", "0", "--routing", "top_p", "--out",
        "/proc/nowhere/r.json"])
    assert done.exit_code == 2 and "r.json cannot be written" in done.stderr
    assert "same tokens" in done.stdout and "top_p" in done.stdout and "beside Python" not in done.stdout


def test_no_price_of_what_is_too_large(sample_bundle, monkeypatch):
    monkeypatch.setattr(residency_price, "machine_memory", lambda: 10**5)
    assert residency_price.price(sample_bundle, {"top_p": {}}, 1) is None


@pytest.mark.parametrize("extra, sentence", [
    (["--budget", "1k"], "less than one coreset"), (["--interval", "often"], "interval"),
    (["--routing", "top_c"], "Routing"), (["--prompt-ids", "x"], "list of integers")])
def test_bad_input(sample_bundle, extra, sentence):
    done = CliRunner().invoke(main, ["bench", "residency", str(sample_bundle.folder), "--verify", "sizes",
                                     "--max-new-tokens", "4", *extra])
    assert done.exit_code == 2 and sentence in done.output
