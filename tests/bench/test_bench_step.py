"""`bench step`: shape of results, exact numbers of experts, parts of the graph, work of a step. No speed is tested."""

from __future__ import annotations

import collections
import json

import numpy as np
import onnx
import pytest
from bench_helpers import bench, bench_json, check_head, shrink
from hypothesis import given
from hypothesis import strategies as st

from dmoe_export.bench import step as step_module
from dmoe_export.bench.parts import PARTS, name_by_part
from dmoe_export.bench.products import products_of
from dmoe_export.bench.steer import assign
from dmoe_export.bench.watch import watched
from dmoe_export.checkpoint.generated import GeneratedCheckpoint
from dmoe_export.errors import RequestError
from dmoe_export.ops.fused import inlined
from dmoe_export.runtime.backend import ForwardInputs
from dmoe_export.runtime.cpu.backend import OnnxRuntimeBackend
from dmoe_export.runtime.cpu.library import INSTALLED

DESCRIPTIONS = [GeneratedCheckpoint(name, 2).description for name in ("tiny", "llada2.0-mini", "llada-moe-tiny")]
QUICK = ("--repeats", 2, "--warmup", 1)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    shrink(monkeypatch)


def test_result_has_every_setting_with_the_experts_asked_for(tiny_bundle, tmp_path):
    found = bench_json("step", tiny_bundle.folder, "--active-experts", "natural,4,16", "--cached", "0,64", *QUICK,
                       "--out", tmp_path / "o" / "step.json", "--plot", tmp_path / "step.png")
    check_head(found, "step")
    assert found == json.loads((tmp_path / "o" / "step.json").read_text())
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path) not in json.dumps(found)  # no paths in a result
    asked = [(r["active_experts"], r["cached"]) for r in found["results"]]
    assert asked == [(count, cached) for count in (None, 4, 16) for cached in (0, 64)]
    for r in found["results"]:
        assert len(r["unique_experts"]) == 1  # one MoE layer
        assert r["active_experts"] in (None, r["unique_experts"][0])
        assert 0 < r["session_seconds"]["median"] <= r["seconds"]["median"] and 0 < r["outside_share"] < 1
        assert r["seconds"]["least"] <= r["seconds"]["lower"] <= r["seconds"]["upper"] and r["seconds"]["count"] == 2
        assert set(r["products_by_part"]) == {"attention", "router", "experts", "ffn", "head"}
        assert set(r["profile_milliseconds"]) == set(PARTS)
        assert all(r["profile_milliseconds"][part] > 0 for part in r["products_by_part"])
        used = {"DmoeLinear", "DmoeAttention"} if INSTALLED.is_file() else {"Gemm", "MatMul"}
        assert used <= {op["op"] for op in r["profile_ops"]}
        assert r["ratio"] > 0 and r["limit_share"] > 0
    by_count = {(r["active_experts"], r["cached"]): r for r in found["results"]}
    assert by_count[16, 0]["bytes_touched"] - by_count[4, 0]["bytes_touched"] == 12 * 3 * 32 * 24 * 4  # 12 experts
    assert by_count[4, 64]["flop"] - by_count[4, 0]["flop"] == 2 * 2 * 2 * 32 * 4 * 64 * 8  # 2 layers, 2 products


def test_table(tiny_bundle):
    result = bench("step", tiny_bundle.folder, "--cached", 0, "--ops", 3, *QUICK)
    assert result.exit_code == 0, result.output
    assert "slowest ops" in result.stdout and "GFLOP/s" in result.stdout


def test_commit_asks_for_one_row_and_dense_models_have_no_experts():
    found = bench_json("step", "--geometry", "llada-tiny", "--block-length", 8, "--tokens", 8, "--cached", "0,5",
                       "--phase", "commit", *QUICK)
    assert found["model"] == "LLaDAModelLM"
    assert found["rows"] == 1 and all(r["unique_experts"] == [] for r in found["results"])
    assert "experts" not in found["results"][0]["products_by_part"]


def test_generated_bundle_is_made_once_and_follows_the_sources(tmp_path, monkeypatch):
    arguments = ("step", "--geometry", "tiny", "--cached", "0", "--work", tmp_path, *QUICK)
    bench_json(*arguments)
    (folder,) = tmp_path.iterdir()
    made = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    bench_json(*arguments)
    again = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert again["denoiser.onnx"] == made["denoiser.onnx"] and again["experts.bin"] == made["experts.bin"]
    monkeypatch.setattr("dmoe_export.bench.workload.sources_digest", lambda: "other sources")
    bench_json(*arguments)
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert after["denoiser.onnx"] > made["denoiser.onnx"] and after["experts.bin"] == made["experts.bin"]


@pytest.mark.parametrize(("arguments", "said"), [
    (("--active-experts", 1), "1 active experts cannot be: 32 tokens with 2 experts each use between 2 and 16."),
    (("--cached", 5), "--cached 5 is not in whole blocks of 32 tokens."),
    (("--cached", 256), "256 cached and 32 new tokens are more than the model's 256 positions."),
    (("--cached", "x"), "--cached is 'x'; give integers"),
    (("--rows", 33), "--rows 33 is not between 1 and --tokens 32."),
])
def test_sizes_the_model_does_not_have(tiny_bundle, arguments, said):
    result = bench("step", tiny_bundle.folder, "--cached", "0", *arguments)
    assert result.exit_code == 2 and said in result.output


@pytest.mark.parametrize(("arguments", "said"), [
    ((), "Give either a BUNDLE or --geometry."),
    (("some.bundle", "--work", "w"), "--work belongs to --geometry; leave it out with a bundle."),
    (("some.bundle", "--precision", "int4"), "--precision belongs to --geometry; leave it out with a bundle."),
    (("--geometry", "huge"), "Geometry 'huge' is not known"),
    (("--geometry", "tiny", "--layers", 9), "--layers 9 is not between 2"),
])
def test_what_to_measure(arguments, said):
    result = bench("step", *arguments)
    assert result.exit_code == 2 and said in result.output


def test_another_number_of_experts_than_asked_for_is_a_failure(tiny_bundle, monkeypatch):
    monkeypatch.setattr(step_module, "steer", lambda model, ids, experts: None)
    result = bench("step", tiny_bundle.folder, "--active-experts", 9, "--cached", 0, *QUICK)
    assert result.exit_code == 1 and "9 active experts were asked for, the layers used" in result.output


@given(st.data())
def test_assignment_uses_all_experts_evenly_within_the_groups(data):
    d = data.draw(st.sampled_from(DESCRIPTIONS))
    moe, tokens = d.experts, data.draw(st.integers(1, 40))
    active = data.draw(st.integers(1, moe.num_experts))
    try:
        ids = assign(tokens, active, d)
    except RequestError:
        # Only what no router could do, or what lies close to it, may be refused.
        assert not moe.experts_per_token <= active <= tokens * moe.experts_per_token // 2
        return
    assert ids.shape == (tokens, moe.experts_per_token)
    assert len(np.unique(ids)) == active and all(len(set(row)) == len(row) for row in ids.tolist())
    groups = ids // (moe.num_experts // moe.num_groups)
    assert all(len(set(row)) <= moe.groups_kept for row in groups.tolist())
    if moe.num_groups == moe.groups_kept:
        counts = np.unique(ids, return_counts=True)[1]
        assert counts.max() - counts.min() <= 1


def test_products_are_the_work_of_the_published_model():
    d = GeneratedCheckpoint("llada2.0-mini", 4).description
    products = products_of(d, 32, 32, 256, [[17] * 15] * 3)
    flop = collections.Counter()
    for product in products:
        flop[product.part] += product.flop
    assert flop["head"] == 2 * 32 * 2048 * 157184  # the 20 GFLOP of the issue
    assert flop["experts"] == 3 * 15 * 17 * 2 * 3 * 2048 * 512
    assert flop["attention"] == 4 * (2 * 32 * 2048 * 3072 + 2 * 32 * 2048 * 2048 + 2 * 2 * 32 * 16 * 128 * 288)
    assert flop["ffn"] == 2 * 32 * 3 * 2048 * 5120 + 3 * 2 * 32 * 3 * 2048 * 512
    assert flop["router"] == 3 * 2 * 32 * 2048 * 256
    experts = sum(p.values for p in products if p.part == "experts")
    assert experts == 3 * 15 * 3 * 2048 * 512


def test_every_node_near_a_weight_gets_its_part(tiny_bundle):
    model = inlined(onnx.load(str(tiny_bundle.denoiser_path), load_external_data=False))
    name_by_part(model)
    parts = {node.output[0]: node.name.split("|") for node in model.graph.node}
    used = {name: parts[node.output[0]] for node in model.graph.node for name in node.input}
    for layer in "01":
        assert used[f"layers.{layer}.attention.qkv.weight"][:2] == ["attention", layer]
        assert used[f"layers.{layer}.attention.out.weight"][:2] == ["attention", layer]
        assert used[f"layers.{layer}.ffn_norm.weight"][0] == "other"
    assert used["layers.0.ffn.up.weight"][:2] == used["layers.0.ffn.down.weight"][:2] == ["ffn", "0"]
    assert used["layers.1.ffn.router.weight"][:2] == ["router", "1"]
    assert used["layers.1.ffn.gate_up"][:2] == ["experts", "1"]
    assert used["lm_head.weight"][0] == "head" and used["embed.weight"][0] == "other"
    attention = [node.name.split("|")[:2] for node in model.graph.node if node.op_type == "DmoeAttention"]
    assert attention == [["attention", "0"], ["attention", "1"]]
    assert {node.name.split("|")[0] for function in model.functions for node in function.node} == {
        "router", "experts", "attention", "ffn", "head"}


def test_bodies_of_linear_layers_count_to_their_parts(tiny_bundle, monkeypatch):
    """Without kernels ONNX Runtime takes the bodies, whose nodes know nothing of the node they stand for."""
    found = bench_json("step", tiny_bundle.folder, "--cached", 0, "--cpu-ops", "off", *QUICK)
    products = {(op["part"], op["nodes"]) for op in found["results"][0]["profile_ops"] if op["op"] == "Gemm"}
    assert products == {("attention", 4), ("ffn", 5), ("router", 1), ("head", 1)}


def test_watched_sessions_tell_the_time_of_their_calls(tiny_bundle):
    with watched() as watch:
        backend = OnnxRuntimeBackend(tiny_bundle)
    plain = OnnxRuntimeBackend(tiny_bundle)
    token = np.zeros((1, 1), np.int64)
    plain.forward(ForwardInputs(token, token, token, {}), plain.new_cache(1))
    assert watch.calls == 0 and watch.seconds == 0
    backend.forward(ForwardInputs(token, token, token, {}), backend.new_cache(1))
    assert watch.calls == 1 and watch.seconds > 0


def test_quantised_experts_count_with_their_scales_and_are_traced_anew(tiny_bundle, tmp_path, monkeypatch):
    arguments = ("step", "--geometry", "tiny", "--precision", "int8", "--cached", 0, "--active-experts", 8,
                 "--work", tmp_path, *QUICK)
    found = bench_json(*arguments)
    assert found["precision"] == "fp32, weights int8 in groups of 32"
    whole = bench_json("step", tiny_bundle.folder, "--cached", 0, "--active-experts", 8, *QUICK)
    saved = whole["results"][0]["bytes_touched"] - found["results"][0]["bytes_touched"]
    # Stored in groups of 32: one byte a weight and four a scale, instead of four bytes a weight. Inner widths of 24 and
    # 48 take no groups, so the down projections outside the experts stay.
    attention, gate_up, head = 2 * (64 + 32) * 32, (96 + 48) * 32, 96 * 32
    weights = 8 * 3 * 32 * 24 + attention + gate_up + head
    assert saved == pytest.approx(weights * (4 - 1 - 4 / 32), rel=0.01)
    monkeypatch.setattr("dmoe_export.bench.workload.sources_digest", lambda: "other sources")
    monkeypatch.setattr("dmoe_export.export.exporter.export_checkpoint", None)  # not made again
    assert bench_json(*arguments)["precision"] == found["precision"]
