"""`bench forward` and the peer llama-cpp: the same model, pairs in turns, and what happens without its packages."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import numpy as np
import pytest
from bench_helpers import bench, bench_json, check_head, shrink

from dmoe_export.bench import forward
from dmoe_export.bench.forward import SAME, Work, distance, float32_logits
from dmoe_export.bench.workload import random_prompt
from dmoe_export.runtime.backend import ForwardInputs
from dmoe_export.runtime.cpu.backend import OnnxRuntimeBackend

NAME = "dmoe_export.bench.peer_llama_cpp"
QUICK = ("--geometry", "llada-tiny", "--tokens", "5,16", "--repeats", 3, "--threads", 1)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    shrink(monkeypatch)
    monkeypatch.setattr(forward, "_PAUSE", 0.0)


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """llama.cpp played by our own backend on the float32 bundle; `error` is added to its logits."""
    module = ModuleType(NAME)
    module.error = 0.0

    class LlamaCpp:
        def __init__(self, path, threads):
            self.bundle = Work(path.parent, "llada-tiny", None, 0, 1).bundle("fp32")
            self.backend = OnnxRuntimeBackend(self.bundle, threads)

        def logits(self, ids, flash=True):
            places = np.arange(len(ids))[None]
            inputs = ForwardInputs(np.array([ids]), places, places, {}, want_logits=True)
            logits = self.backend.forward(inputs, self.backend.new_cache(1)).logits[0]
            return logits + module.error * np.random.default_rng(0).standard_normal(logits.shape, np.float32)

        def close(self):
            self.backend.close()

    module.LlamaCpp = LlamaCpp
    module.TYPES = {"f32": 0, "q8_0": 7}
    module.quantise = lambda source, target, kind, threads: target.write_bytes(b"x" * 100)
    module.bytes_by_type = lambda path: {"f32": 100}
    module.version = lambda: "stand-in"
    monkeypatch.setitem(sys.modules, NAME, module)
    monkeypatch.setattr(forward, "_CHILD", "import sys; sys.exit(0)")
    monkeypatch.setattr(Work, "_write", lambda self, path: path.write_bytes(b"x" * 200))
    return module


def test_pairs_are_measured_in_turns(stand_in, tmp_path):
    found = bench_json("forward", *QUICK, "--precision", "fp32,fp32", "--work", tmp_path, "--out", tmp_path / "f.json")
    check_head(found, "forward")
    assert found == json.loads((tmp_path / "f.json").read_text())
    assert [(r["tokens"], r["precision"], r["products"].split()[0], r["peer_type"]) for r in found["results"]] == [
        (5, "fp32", "exact", "f32"), (16, "fp32", "exact", "f32")]
    for r in found["results"]:
        assert r["ours"]["seconds"]["count"] == r["peer"]["seconds"]["count"] == 3
        assert r["ours"]["distance"] < 1e-12 and r["ours"]["same_best"] == r["peer"]["same_best"] == 1.0
        least = r["peer"]["seconds"]["least"] / r["ours"]["seconds"]["least"]
        assert r["ratio_of_least"] == pytest.approx(least) and r["ratio"] > 0
    assert [(m["who"], m["kind"]) for m in found["models"]] == [("ours", "fp32"), ("llama-cpp", "f32")]
    assert found["models"][0]["disk_bytes"] > 10_000 and found["models"][1]["disk_bytes"] == 200


def test_another_model_is_not_timed(stand_in, tmp_path):
    stand_in.error = 1e-2
    result = bench("forward", *QUICK, "--work", tmp_path)
    assert result.exit_code == 1
    assert "it does not run the same model, so nothing was timed." in result.output


def test_distance_is_one_minus_cosine():
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((7, 33)).astype(np.float32) for _ in range(2))
    wide = [x.astype(np.float64).ravel() for x in (a, b)]
    expected = 1 - wide[0] @ wide[1] / np.sqrt((wide[0] @ wide[0]) * (wide[1] @ wide[1]))
    assert distance(a, b) == pytest.approx(expected, rel=1e-12)
    assert abs(distance(a, a)) < 1e-15 and distance(a, -a) == pytest.approx(2)


@pytest.mark.parametrize(("arguments", "said"), [
    (("--precision", "fp8"), "--precision is 'fp8'; give names separated by commas, of fp32, fp16, bf16, int8, int4."),
    (("--cpu-products", ""), "--cpu-products is ''; give names separated by commas, of exact, fast."),
    (("--tokens", "5,257"), "--tokens 5,257 is not between 1 and the model's 256 positions."),
    (("--tokens", "0"), "--tokens 0 is not between 1 and the model's 256 positions."),
])
def test_settings_that_make_no_sense(stand_in, tmp_path, arguments, said):
    result = bench("forward", *QUICK, "--work", tmp_path, *arguments)
    assert result.exit_code == 2 and said in result.output


@pytest.mark.parametrize("verb", ["forward", "generate"])
def test_without_the_packages_there_is_a_sentence(monkeypatch, verb, tmp_path):
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    more = () if verb == "forward" else ("--peer", "llama-cpp", "--cache", "none", "--prompt-tokens", 5)
    result = bench(verb, "--geometry", "llada-tiny", *more)
    assert result.exit_code == 3
    assert "The peer llama-cpp needs the packages llama-cpp-python and gguf" in result.output
    assert "leave the peer out." in result.output


@pytest.mark.parametrize("geometry", ["llada-tiny", "dream-tiny", "llada-moe-tiny"])
def test_llama_cpp_runs_the_same_model(geometry, tmp_path):
    """The GGUF file: names, rotary order, biases, norms, experts."""
    pytest.importorskip("llama_cpp", reason="no part of `make test`; pip install '.[peer]'")
    work = Work(tmp_path, geometry, None, 0, 1)
    bundle = work.bundle("fp32")
    wide, distances = float32_logits(work, bundle, {n: random_prompt(bundle, n, 0) for n in (5, 48)})
    assert wide[48].shape == (48, 96) and max(distances.values()) < SAME / 1000


def test_llama_cpp_gives_the_same_answer(tmp_path):
    pytest.importorskip("llama_cpp", reason="no part of `make test`; pip install '.[peer]'")
    found = bench_json("generate", "--geometry", "dream-tiny", "--prompt-tokens", 20, "--max-new-tokens", 40, "--steps",
                       6, "--cache", "none", "--peer", "llama-cpp,llama-cpp:q8_0", "--rounds", 1)
    peers = found["results"][0]["peers"]
    assert peers["llama-cpp"]["same_tokens"]
    assert not any(peer["must_agree"] for peer in peers.values())


def test_llama_cpp_does_not_run_llada2(tmp_path):
    pytest.importorskip("llama_cpp", reason="no part of `make test`; pip install '.[peer]'")
    result = bench("forward", *QUICK, "--geometry", "tiny")
    assert result.exit_code == 2 and "llama.cpp runs LLaDA, Dream and LLaDA-MoE" in result.output
