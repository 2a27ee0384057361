"""Expert residency never changes a token: every budget and interval against the same backend without one."""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import threading

import numpy as np
import pytest
from click.testing import CliRunner

from dmoe_export import export_checkpoint
from dmoe_export.bundle.reader import Bundle
from dmoe_export.checkpoint.synthetic import GEOMETRIES, write_synthetic
from dmoe_export.cli import main
from dmoe_export.errors import BundleError, MissingRequirementError, RequestError
from dmoe_export.generator import Generator
from dmoe_export.runtime import cpu_ops
from dmoe_export.runtime.backend import ForwardInputs
from dmoe_export.runtime.budget import ExpertBudget
from dmoe_export.runtime.mapped_memory import FileIdentity
from dmoe_export.runtime.onnxruntime import OnnxRuntimeBackend
from dmoe_export.runtime.resident import open_resident

BUDGETS, INTERVALS = ("100%", "50%", "25%", "10%"), (1, 4, 32)
QUESTIONS = ["what is 2 plus 3?", "write the numbers 4 7 1 9 from last to first.", "what is the capital of france?"]


def _open(bundle: Bundle, **options) -> Generator:
    return Generator.open(bundle.folder, backend="onnxruntime", threads=1, verify="sizes", **options)


@pytest.fixture(scope="module")
def sample_answers(sample_bundle):
    return [g.token_ids for g in _open(sample_bundle).generate(QUESTIONS, max_new_tokens=48)]


@pytest.mark.parametrize("interval", [*INTERVALS, "auto", "never"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_sample_answers_are_the_same(sample_bundle, sample_answers, budget, interval):
    generator = _open(sample_bundle, expert_budget=budget, expert_refresh_interval=interval)
    answers = generator.generate(QUESTIONS, max_new_tokens=48)
    assert [g.token_ids for g in answers] == sample_answers
    residency = answers[-1].stats.residency
    assert residency["hits"] + residency["misses"] > 0
    if budget == "100%":
        assert residency["evictions"] == 0 and residency["residents_per_layer"] == 32
    generator.backend.close()


@pytest.mark.parametrize("interval", INTERVALS)
@pytest.mark.parametrize("budget", BUDGETS)
def test_recorded_runs_are_the_same(golden, golden_bundle, budget, interval):
    """All of the reference's recordings, token for token."""
    meta, data = json.loads((golden / "generate.json").read_text()), np.load(golden / "generate.npz")
    generator = _open(golden_bundle, expert_budget=budget, expert_refresh_interval=interval)
    assert len(meta) == 8
    for run, m in enumerate(meta):
        eos = m.get("eos_id", None if m["eos"] else -1)
        (answer,) = generator.generate([data[f"{run}.prompt"][0].tolist()], max_new_tokens=m["gen"], steps=m["steps"],
                                       threshold=m["thr"], early_stop=m["eos"], eos_id=eos)
        want = data[f"{run}.tokens"][0].tolist()[m["P"] if m["contains_prompt"] else 0:]
        assert [*answer.token_ids, *([eos] if "eos_id" in m else [])] == want
        assert answer.stats.forwards == m["forwards"]
    assert generator.backend.statistics().refreshes > 0
    generator.backend.close()


def _without_kernel(monkeypatch):
    monkeypatch.setattr(cpu_ops, "INSTALLED", cpu_ops.INSTALLED.with_name("none"))


def _skip_without_kernel():
    if not cpu_ops.INSTALLED.is_file():
        pytest.skip("our CPU kernels are not built (make cpu-ops)")


def _same_bits(bundle, budget, threads):
    """Logits, confidences, keys and values; rows of different lengths, one of nothing but padding."""
    plain = OnnxRuntimeBackend(bundle, threads)
    under = Generator.open(bundle.folder, backend="onnxruntime", threads=threads, verify="sizes",
                           expert_budget=budget, expert_refresh_interval=1).backend
    random = np.random.default_rng(0)
    for tokens in (1, 2, 31, 96, 32):
        ids = random.integers(0, 90, (3, tokens))
        positions = np.tile(np.arange(tokens), (3, 1))
        positions[1, (tokens + 1) // 2:] = positions[2] = -1
        inputs = ForwardInputs(ids, positions, np.tile(np.arange(tokens), (3, 1)), {}, True, True)
        one, other = (backend.forward(inputs, backend.new_cache(3)) for backend in (plain, under))
        for name in ("token_ids", "confidence", "expert_ids", "logits"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        for a, b in zip(one.keys_values, other.keys_values, strict=True):
            np.testing.assert_array_equal(a, b)
    assert under.statistics().misses > 0
    under.close()


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("budget", BUDGETS)
def test_every_bit_is_the_same(golden_bundle, budget, threads, kernel, monkeypatch):
    _skip_without_kernel() if kernel else _without_kernel(monkeypatch)
    _same_bits(golden_bundle, budget, threads)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_every_bit_of_quantised_experts_is_the_same(precision, tmp_path, monkeypatch):
    _skip_without_kernel()
    config = {"hidden_size": 256, "moe_intermediate_size": 256, "num_hidden_layers": 2}
    write_synthetic(tmp_path / "checkpoint", GEOMETRIES["tiny"] | config)
    bundle = export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle", precision=precision)
    for budget in BUDGETS[:3]:
        _same_bits(bundle, budget, 2)
    _without_kernel(monkeypatch)
    with pytest.raises(MissingRequirementError, match=rf"needs our CPU kernels where experts are {precision}"):
        _open(bundle, expert_budget="50%")


def test_statistics_are_of_the_request(sample_bundle):
    generator = _open(sample_bundle, expert_budget="50%", expert_refresh_interval=1)
    first, second = (generator.generate(QUESTIONS[0], max_new_tokens=32)[0].stats for _ in range(2))
    assert first.residency["promotions"] > second.residency["promotions"] == 0  # all it needs is there
    layers = len(sample_bundle.manifest.model.moe_layers)
    assert second.residency["hits"] + second.residency["misses"] == sum(
        round(u * layers) for values in second.unique_by_phase.values() for u in values)
    assert second.as_dict()["residency"]["hit_rate"] > first.residency["hit_rate"]
    assert "residency" not in _open(sample_bundle).generate(QUESTIONS[0], max_new_tokens=32)[0].stats.as_dict()
    generator.backend.close()


@pytest.fixture
def own_bundle(sample_bundle, tmp_path):
    return Bundle(shutil.copytree(sample_bundle.folder, tmp_path / "own"), sample_bundle.manifest)


def _touch(path):
    os.utime(path)


def _replace(path):
    other = path.with_suffix(".new")
    shutil.copyfile(path, other)
    other.replace(path)


def _shorten(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("harm", [_touch, _replace, _shorten, lambda path: path.unlink()])
def test_expert_file_changed_while_running(own_bundle, harm):
    generator = _open(own_bundle, expert_budget="25%")
    generator.generate(QUESTIONS[0], max_new_tokens=32)
    harm(own_bundle.folder / "experts.bin")
    with pytest.raises(BundleError, match=r"experts\.bin was changed or removed while it was in use"):
        generator.generate(QUESTIONS[0], max_new_tokens=32)
    generator.backend.close()


def test_changed_during_a_forward_gives_no_token(own_bundle):
    generator = _open(own_bundle, expert_budget="25%")
    inner = generator.backend._backend
    run = inner.forward

    def forward(inputs, cache):
        outputs = run(inputs, cache)
        _touch(own_bundle.folder / "experts.bin")
        return outputs

    inner.forward = forward
    with pytest.raises(BundleError, match="changed or removed"):
        generator.generate(QUESTIONS[0], max_new_tokens=32)
    generator.backend.close()


def test_half_precision_is_refused(sample_bundle):
    half = Bundle(sample_bundle.folder, sample_bundle.manifest.model_copy(update={"precision": "fp16"}))
    with pytest.raises(MissingRequirementError, match=r"needs float32 outside experts, .* is fp16"):
        open_resident(half, ExpertBudget(10**6, 1), "auto")


def test_the_onnx_package_is_asked_for(sample_bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingRequirementError, match=r"needs onnx, .* pip install onnx"):
        _open(sample_bundle, expert_budget="25%")


def test_bad_options(sample_bundle):
    for options in ({"expert_budget": "-4G"}, {"expert_budget": "1k"}, {"expert_budget": "9000T"},
                    {"experts_per_layer": 0}, {"expert_budget": "1G", "expert_refresh_interval": 0}):
        with pytest.raises(RequestError):
            _open(sample_bundle, **options)


def test_a_dropped_generator_lets_go(sample_bundle):
    file, before = FileIdentity.of(sample_bundle.folder / "experts.bin"), set(threading.enumerate())
    gc.collect()
    others = file.resident_bytes()
    generator = _open(sample_bundle, expert_budget="25%", expert_refresh_interval=1)
    generator.generate(QUESTIONS[0], max_new_tokens=32)
    threads = set(threading.enumerate()) - before
    assert file.resident_bytes() > others and any(thread.name.startswith("bring-experts") for thread in threads)
    del generator
    gc.collect()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)
    assert file.resident_bytes() == others


def test_a_closed_one_goes_on_under_its_budget(sample_bundle, sample_answers):
    generator = _open(sample_bundle, expert_budget="25%")
    generator.backend.close()
    assert [g.token_ids for g in generator.generate(QUESTIONS, max_new_tokens=48)] == sample_answers
    done = generator.backend.statistics()
    assert done.misses > 0 and 0 < done.peak_bytes <= done.budget_bytes


def test_salient_steps_are_refused(sample_bundle):
    generator = _open(sample_bundle, expert_budget="50%")
    with pytest.raises(RequestError, match="do not go together"):
        generator.generate(QUESTIONS[0], max_new_tokens=32, salient_threshold=0.99)
    generator.backend.close()


def test_other_systems_are_refused(sample_bundle, monkeypatch):
    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(MissingRequirementError, match="needs Linux"):
        _open(sample_bundle, expert_budget="50%")


def test_command(sample_bundle):
    arguments = ["generate", str(sample_bundle.folder), "--prompt", QUESTIONS[0], "--max-new-tokens", "32", "--verify",
                 "sizes", "--json"]
    plain = json.loads(CliRunner().invoke(main, arguments).stdout)
    for extra in (["--expert-budget", "25%"], ["--experts-per-layer", "4", "--expert-refresh-interval", "2"]):
        done = CliRunner().invoke(main, arguments + extra)
        assert done.exit_code == 0, done.output
        answer = json.loads(done.stdout)
        assert answer["token_ids"] == plain["token_ids"]
        assert answer["stats"]["residency"]["refreshes"] > 0 and answer["backend"]["name"] == "onnxruntime"
    summary = CliRunner().invoke(main, [*arguments[:-1], "--expert-budget", "25%"]).output
    assert "of uses resident" in summary


@pytest.mark.parametrize("extra, code, sentence", [
    (["--expert-budget", "-4G"], 2, "not positive"), (["--expert-budget", "1k"], 2, "less than one coreset"),
    (["--experts-per-layer", "99"], 2, "between 1 and"), (["--expert-budget", "1G", "--experts-per-layer", "3"], 2,
                                                          "not both"),
    (["--expert-budget", "50%", "--backend", "tensorrt"], 3, ""),
    (["--expert-budget", "50%", "--expert-refresh-interval", "often"], 2, "interval")])
def test_command_bad_input(sample_bundle, extra, code, sentence):
    done = CliRunner().invoke(main, ["generate", str(sample_bundle.folder), "--prompt", "hello", "--verify", "sizes",
                                     *extra])
    assert done.exit_code == code and sentence in done.output, done.output
