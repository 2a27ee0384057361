"""`bench generate`: shape of results, and a peer that gives the same tokens or fails the command."""

from __future__ import annotations

import json

import numpy as np
import pytest
from bench_helpers import bench, bench_json, check_head, shrink
from bundles import with_decoding

from dmoe_export.bench.peer import Peer
from dmoe_export.checkpoint.generated import GeneratedCheckpoint
from dmoe_export.export.exporter import export_checkpoint
from dmoe_export.runtime.backend import ForwardInputs
from dmoe_export.runtime.cpu.backend import OnnxRuntimeBackend
from dmoe_export.runtime.cpu.library import INSTALLED

QUICK = ("--rounds", 1, "--max-new-tokens", 40, "--steps", 3)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    shrink(monkeypatch)


def test_result_has_every_setting_and_equal_tokens(tiny_bundle, tmp_path):
    found = bench_json("generate", tiny_bundle.folder, "--prompt-tokens", "5,64", "--coreset", "default,3,all",
                       *QUICK, "--out", tmp_path / "g.json", "--plot", tmp_path / "g.png")
    check_head(found, "generate")
    assert found == json.loads((tmp_path / "g.json").read_text())
    assert (tmp_path / "g.png").read_bytes().startswith(b"\x89PNG")
    names = [(r["prompt_tokens"], r["coreset"]) for r in found["results"]]
    assert names == [(n, c) for n in (5, 64) for c in ("default", "3", "all")]
    for r in found["results"]:
        assert r["peers"]["eager"]["same_tokens"] is True and r["peers"]["eager"]["first_difference"] is None
        assert r["new_tokens"] == 40 and r["forwards"] == sum(r["forwards_by_phase"].values())
        assert 0 < r["host_share"]["median"] < 1
        assert r["peers"]["eager"]["ratio"] > 0 and r["peers"]["eager"]["step_ratio"] > 0
        for side in (r["ours"], r["peers"]["eager"]):
            assert side["tokens_per_second"]["median"] == pytest.approx(40 / side["seconds"]["median"])
    unique = {r["coreset"]: r["unique_experts"] for r in found["results"] if r["prompt_tokens"] == 64}
    assert unique["3"] <= 3 < unique["all"] <= 16


def test_the_published_loop_gives_the_same_tokens(tiny_bundle):
    pytest.importorskip("diffusers", reason="no part of `make test`; pip install diffusers transformers")
    found = bench_json("generate", tiny_bundle.folder, "--prompt-tokens", "24,88", "--coreset", "3,all",
                       "--peer", "diffusers", *QUICK)
    assert all(r["peers"]["diffusers"]["same_tokens"] for r in found["results"])


def test_kernels_off_and_on_give_the_same_tokens(tiny_bundle):
    found = bench_json("generate", tiny_bundle.folder, "--prompt-tokens", 5, "--peer", "onnxruntime", *QUICK)
    assert found["results"][0]["peers"]["onnxruntime"]["same_tokens"] is True
    assert found["cpu_ops"] is INSTALLED.is_file()


def test_a_preset_holds_for_both_sides_and_the_published_loop_refuses_what_it_cannot_do(tiny_bundle, tmp_path):
    bundle = with_decoding(tiny_bundle, tmp_path / "b", {"edit_passes": 1}, {
        "speed": {"threshold": 0.0, "edit_threshold": 0.0}})
    runs = {preset: bench_json("generate", bundle.folder, "--prompt-tokens", 5, *preset, *QUICK)
            for preset in (("--peer", "none"), ("--preset", "speed"))}
    assert [found["preset"] for found in runs.values()] == [None, "speed"]
    (plain,), (fast,) = (found["results"] for found in runs.values())
    assert fast["peers"]["eager"]["same_tokens"]
    assert fast["forwards"] < plain["forwards"]
    for words, sentence in ((("speed", "--peer", "diffusers"), "The peer diffusers neither edits nor accepts by"),
                            (("fast",), "preset is 'fast', but the presets of")):
        result = bench("generate", bundle.folder, "--prompt-tokens", 5, "--preset", *words, *QUICK)
        assert result.exit_code == 2 and sentence in result.stderr


def test_without_a_peer(tiny_bundle):
    result = bench("generate", tiny_bundle.folder, "--prompt-tokens", 5, "--peer", "none", "--cpu-ops", "off", *QUICK)
    assert result.exit_code == 0, result.output
    assert "products by ONNX Runtime" in result.stdout
    assert "tokens/s" in result.stdout and "NO" not in result.stdout


def test_a_peer_with_other_tokens_fails_the_command_after_the_result(tiny_bundle, monkeypatch, tmp_path):
    experts = Peer._experts
    monkeypatch.setattr(Peer, "_experts", lambda self, h, *rest: -3 * experts(self, h, *rest))
    result = bench("generate", tiny_bundle.folder, "--prompt-tokens", 64, *QUICK, "--out", tmp_path / "g.json")
    assert result.exit_code == 1 and "The answer of peer eager differs from ours at place" in result.output
    (found,) = json.loads((tmp_path / "g.json").read_text())["results"]
    side = found["peers"]["eager"]
    assert side["same_tokens"] is False and side["first_difference"] is not None


def test_a_canvas_has_no_eager_peer_and_need_not_agree(golden, exported):
    bundle = exported(golden.parent / "diffusion_gemma" / "model")
    words = ("generate", bundle.folder, "--prompt-tokens", "5", *QUICK)
    refused = bench(*words)
    assert refused.exit_code == 2 and refused.stderr == (
        f"dmoe-export: Peer eager fills masks, and {bundle.folder.name} denoises a canvas of random tokens; use --peer "
        "onnxruntime, or none.\n")
    (found,) = bench_json(*words, "--peer", "onnxruntime")["results"]
    assert found["peers"]["onnxruntime"]["must_agree"] is False


@pytest.mark.parametrize("geometry", ["tiny", "dream-tiny", "llada-moe-tiny"])
def test_peer_computes_what_the_bundle_does(geometry, tmp_path, tiny_bundle):
    """Full and block-causal attention, experts or none, shared ones or none, biases, cached keys."""
    bundle = (tiny_bundle if geometry == "tiny" else
              export_checkpoint(GeneratedCheckpoint(geometry), tmp_path / "b"))
    d, rng, n = bundle.manifest.model, np.random.default_rng(0), 32
    ids = rng.integers(0, d.vocab_size - 2, (1, 3 * n))
    sides = [OnnxRuntimeBackend(bundle, 1), Peer(bundle, 1)]
    first = ForwardInputs(ids[:, :2 * n], np.arange(2 * n)[None], np.array([[0, 15]]), {}, True, True)
    second = ForwardInputs(ids[:, 2 * n:], np.arange(2 * n, 3 * n)[None], np.arange(n)[None], {}, True, True)
    results = []
    for backend in sides:
        cache = backend.new_cache(1)
        before = backend.forward(first, cache)
        cache.commit(first, before, (np.arange(2 * n) % 3 > 0)[None])  # some are not kept
        results.append((before, backend.forward(second, cache)))
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(theirs.logits, ours.logits, atol=2e-4)
        np.testing.assert_array_equal(theirs.token_ids, ours.token_ids)
        np.testing.assert_allclose(theirs.confidence, ours.confidence, rtol=2e-4)
        np.testing.assert_array_equal(np.sort(theirs.expert_ids), np.sort(ours.expert_ids))


@pytest.mark.parametrize(("arguments", "said"), [
    (("--coreset", "many"), "Coreset 'many' is not known; give a number of experts, all or default."),
    (("--coreset", "17"), "min_experts is 17, it must be between 1 and 16."),
    (("--cache", "dual"), "Cache dual is an approximation"),
    (("--prompt-tokens", "0"), "Prompt 0 is empty"),
    (("--peer", "mine"), "Peer 'mine' is not known; known: eager, diffusers, onnxruntime, llama-cpp, none."),
    (("--peer", "llama-cpp"), "The peer llama-cpp gets its weights from --geometry; leave BUNDLE out, or the peer."),
])
def test_settings_that_make_no_sense(tiny_bundle, arguments, said):
    result = bench("generate", tiny_bundle.folder, "--prompt-tokens", "5", *QUICK, *arguments)
    assert result.exit_code == 2 and said in result.output
