"""Expert residency never changes a token: every budget and interval against the same backend without one."""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from residency_helpers import (
    ANSWER,
    BUDGETS,
    INTERVALS,
    PAIRS,
    QUESTIONS,
    open_generator,
    same_bits,
    without_kernel,
)

from dmoe_export import export_checkpoint
from dmoe_export.bundle.reader import Bundle
from dmoe_export.checkpoint.synthetic import GEOMETRIES, write_synthetic
from dmoe_export.cli import main
from dmoe_export.errors import BundleError, MissingRequirementError, RequestError
from dmoe_export.runtime.cpu.mapped_memory import FileIdentity

pytestmark = pytest.mark.usefixtures("our_kernels")


@pytest.fixture(scope="module")
def sample_answers(sample_bundle):
    return [g.token_ids for g in open_generator(sample_bundle).generate(QUESTIONS, **ANSWER)]


@pytest.mark.parametrize("interval", [*INTERVALS, "auto", "never"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_sample_answers_are_the_same(sample_bundle, sample_answers, budget, interval):
    generator = open_generator(sample_bundle, expert_budget=budget, expert_refresh_interval=interval)
    answers = generator.generate(QUESTIONS, **ANSWER)
    assert [g.token_ids for g in answers] == sample_answers
    residency = answers[-1].stats.residency
    assert residency["hits"] > 0 and answers[0].stats.forwards > 30
    if budget == "100%":
        assert residency["evictions"] == 0 and residency["residents_per_layer"] == 32
    else:
        assert residency["misses"] > 0
    generator.backend.close()


@pytest.mark.parametrize("budget, interval", PAIRS)
def test_recorded_runs_are_the_same(golden, golden_bundle, budget, interval):
    """All of the reference's recordings, token for token."""
    meta, data = json.loads((golden / "generate.json").read_text()), np.load(golden / "generate.npz")
    generator = open_generator(golden_bundle, expert_budget=budget, expert_refresh_interval=interval)
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


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("budget", BUDGETS)
def test_every_bit_is_the_same(golden_bundle, budget, threads):
    same_bits(golden_bundle, budget, threads)


@pytest.mark.parametrize("precision, dense", [
    pytest.param("int8", None, marks=pytest.mark.slow), ("int4", "fp32"),
    pytest.param("int8", "fp16", marks=pytest.mark.slow)])
def test_every_bit_of_integers_is_the_same(precision, dense, tmp_path):
    """Experts so wide that their scales are whole pages, too."""
    config = {"hidden_size": 512, "moe_intermediate_size": 256, "num_hidden_layers": 2}
    write_synthetic(tmp_path / "checkpoint", GEOMETRIES["tiny"] | config)
    bundle = export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle", precision=precision,
                               dense_precision=dense, compute="fp16" if dense == "fp16" else "fp32")
    for budget in BUDGETS[:3]:
        same_bits(bundle, budget, 2)


def test_every_bit_of_bfloat16_is_the_same(tiny_checkpoint, exported):
    bundle = exported(tiny_checkpoint, precision="bf16")
    for budget in BUDGETS[:3]:
        same_bits(bundle, budget, 2)


def test_statistics_are_of_the_request(sample_bundle):
    generator = open_generator(sample_bundle, expert_budget="50%", expert_refresh_interval=1)
    first, second = (generator.generate(QUESTIONS[0], max_new_tokens=32)[0].stats for _ in range(2))
    assert first.residency["promotions"] > second.residency["promotions"] == 0  # all it needs is there
    layers = len(sample_bundle.manifest.model.moe_layers)
    assert second.residency["hits"] + second.residency["misses"] == sum(
        round(u * layers) for values in second.unique_by_phase.values() for u in values)
    assert second.as_dict()["residency"]["hit_rate"] > first.residency["hit_rate"]
    assert "residency" not in open_generator(sample_bundle).generate(QUESTIONS[0], max_new_tokens=32)[0].stats.as_dict()
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
    generator = open_generator(own_bundle, expert_budget="25%")
    generator.generate(QUESTIONS[0], max_new_tokens=32)
    harm(own_bundle.folder / "experts.bin")
    with pytest.raises(BundleError, match=r"experts\.bin was changed or removed while it was in use"):
        generator.generate(QUESTIONS[0], max_new_tokens=32)
    generator.backend.close()


def test_expert_file_linked_while_running(own_bundle, tmp_path):
    """As building engines of a bundle that is being served does."""
    generator = open_generator(own_bundle, expert_budget="25%")
    before = generator.generate(QUESTIONS[0], max_new_tokens=32)
    os.link(own_bundle.folder / "experts.bin", tmp_path / "experts.bin")
    assert generator.generate(QUESTIONS[0], max_new_tokens=32)[0].token_ids == before[0].token_ids
    generator.backend.close()


def test_changed_during_a_forward_gives_no_token(own_bundle):
    generator = open_generator(own_bundle, expert_budget="25%")
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


def test_without_our_kernels_it_is_refused(sample_bundle, monkeypatch):
    without_kernel(monkeypatch)
    with pytest.raises(MissingRequirementError, match=r"needs our CPU kernels, .* pip install \. "):
        open_generator(sample_bundle, expert_budget="50%")


def test_it_needs_no_onnx_package(sample_bundle, sample_answers, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    generator = open_generator(sample_bundle, expert_budget="25%")
    assert [g.token_ids for g in generator.generate(QUESTIONS, **ANSWER)] == sample_answers
    generator.backend.close()


def test_bad_options(sample_bundle):
    for options in ({"expert_budget": "-4G"}, {"expert_budget": "1k"}, {"expert_budget": "9000T"},
                    {"experts_per_layer": 0}, {"expert_budget": "1G", "expert_refresh_interval": 0}):
        with pytest.raises(RequestError):
            open_generator(sample_bundle, **options)


def _threads():
    """Of residency, by number."""
    names = {task: (task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()}
    return {task for task, name in names.items() if name in ("bring-experts", "read-experts")}


def test_a_dropped_generator_lets_go(sample_bundle):
    file = FileIdentity.of(sample_bundle.folder / "experts.bin")
    gc.collect()
    others, before = file.resident_bytes(), _threads()
    generator = open_generator(sample_bundle, expert_budget="25%", expert_refresh_interval=1)
    generator.generate(QUESTIONS[0], max_new_tokens=32)
    generator.backend._tier.wait()
    threads = _threads() - before
    assert file.resident_bytes() > others and threads
    del generator
    gc.collect()
    assert file.resident_bytes() == others and not threads & _threads()


def test_a_closed_one_lets_go_and_remembers_what_it_did(sample_bundle):
    """While it is still held, and in the middle of an answer."""
    file = FileIdentity.of(sample_bundle.folder / "experts.bin")
    gc.collect()
    others, before = file.resident_bytes(), _threads()
    generator = open_generator(sample_bundle, expert_budget="25%", expert_refresh_interval=1)
    stream = generator.stream(QUESTIONS[0], max_new_tokens=80, eos_id=-1)
    next(stream)
    generator.backend._tier.wait()
    assert file.resident_bytes() > others and _threads() - before
    done = generator.backend.statistics()
    generator.close()
    assert file.resident_bytes() == others and _threads() <= before
    assert generator.backend.statistics() == done and done.misses > 0 and 0 < done.peak_bytes <= done.budget_bytes
    with pytest.raises(RequestError, match="was closed"):
        next(stream)


def test_other_systems_are_refused(sample_bundle, monkeypatch):
    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(MissingRequirementError, match="needs Linux"):
        open_generator(sample_bundle, expert_budget="50%")


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
        assert answer["backend"]["why"].startswith("the bundle has no engine with expert pools")
    summary = CliRunner().invoke(main, [*arguments[:-1], "--expert-budget", "25%"]).output
    assert "of uses resident" in summary


@pytest.mark.parametrize("extra, code, sentence", [
    (["--expert-budget", "-4G"], 2, "not positive"), (["--expert-budget", "1k"], 2, "less than one coreset"),
    (["--experts-per-layer", "99"], 2, "between 2 and"), (["--expert-budget", "1G", "--experts-per-layer", "3"], 2,
                                                          "not both"),
    (["--expert-budget", "50%", "--backend", "tensorrt"], 3, ""),
    (["--expert-budget", "50%", "--expert-refresh-interval", "often"], 2, "interval")])
def test_command_bad_input(sample_bundle, extra, code, sentence):
    done = CliRunner().invoke(main, ["generate", str(sample_bundle.folder), "--prompt", "hello", "--verify", "sizes",
                                     *extra])
    assert done.exit_code == code and sentence in done.output, done.output
