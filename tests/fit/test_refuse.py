"""Verdicts, and what is refused before anything is opened."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from dmoe_export.cli import main
from dmoe_export.cli.inspect_fit import cannot_run
from dmoe_export.errors import RequestError
from dmoe_export.fit import refuse
from dmoe_export.fit.largest import MEBIBYTE, budget_that_fits, most, verdict_of
from dmoe_export.fit.predict import predict
from dmoe_export.fit.refuse import refuse_unfit

GB = 10**9


@pytest.fixture(scope="module")
def large(sample_bundle):
    """A manifest whose experts are a thousand times as large: 9.4 GB of them."""
    manifest = sample_bundle.manifest
    slabs = {name: getattr(manifest.experts, name) * 1000 for name in ("gate_up_slab_bytes", "down_slab_bytes")}
    return manifest.model_copy(update={"experts": manifest.experts.model_copy(update=slabs)})


def _fits(manifest, memory, **asked):
    return predict(manifest, kernels=True, **asked).host_bytes <= memory


def test_what_fits_is_not_refused(sample_bundle):
    refuse_unfit(sample_bundle)
    refuse_unfit(sample_bundle.folder, max_batch=64, memory="4G")
    needed = predict(sample_bundle.manifest, max_batch=8, max_context=64, kernels=True).host_bytes
    refuse_unfit(sample_bundle.manifest, max_batch=8, memory=int(needed / 1.09))  # predictions may be a tenth too high


def test_the_sentence_has_the_need_the_room_and_a_budget_that_fits(large):
    with pytest.raises(RequestError) as caught:
        refuse_unfit(large, name="big.bundle", max_batch=2, memory=3 * GB)
    said = re.fullmatch(r"big\.bundle needs (\S+ GB) of memory for 2 answers at once of 64 tokens, there are 3\.0 GB; "
                        r"give --expert-budget (\d+)M, or say what there is with --memory\.", str(caught.value))
    assert said and said[1] == "9.6 GB"
    budget = int(said[2]) * MEBIBYTE
    asked = {"max_batch": 2, "max_context": 64, "machine_bytes": 1 << 62}
    assert _fits(large, 3 * GB, expert_budget=budget, **asked)
    assert not _fits(large, 3 * GB, expert_budget=budget + MEBIBYTE, **asked)
    refuse_unfit(large, max_batch=2, memory=3 * GB, expert_budget=budget)


def test_a_smaller_batch_is_the_advice_where_one_fits(sample_bundle):
    manifest = sample_bundle.manifest
    have = predict(manifest, max_batch=20, max_context=512, kernels=True, expert_budget="100%").host_bytes
    with pytest.raises(RequestError, match=r"of 512 tokens, .*; give --max-batch 20, or say"):
        refuse_unfit(manifest, max_batch=64, max_context=512, memory=have, expert_budget="100%")


def test_where_nothing_helps_it_says_so(sample_bundle):
    with pytest.raises(RequestError, match=r"use a machine with more, export with a smaller --precision, or say"):
        refuse_unfit(sample_bundle, memory="60M")


@pytest.mark.parametrize("backend", ["tensorrt", "onnxruntime-cuda"])
def test_what_runs_on_a_gpu_is_not_refused_here(large, backend):
    refuse_unfit(large, backend=backend, memory=GB)


def test_auto_is_refused_only_where_no_gpu_is(large, monkeypatch):
    monkeypatch.setattr(refuse, "has_gpu", lambda: True)
    refuse_unfit(large, memory=GB)
    with pytest.raises(RequestError, match="needs"):
        refuse_unfit(large, memory=GB, products="fast")  # the CPU's
    monkeypatch.setattr(refuse, "has_gpu", lambda: False)
    with pytest.raises(RequestError, match="needs"):
        refuse_unfit(large, memory=GB)


def test_the_largest_are_the_largest(sample_bundle):
    manifest, memory = sample_bundle.manifest, 300_000_000
    asked = {"max_batch": 16, "max_context": 512}
    told = verdict_of(manifest, memory, None, kernels=True, **asked)
    assert told.fits is False and told.largest_batch and told.largest_context
    for name, value, step in (("max_batch", told.largest_batch, 1), ("max_context", told.largest_context, 32)):
        assert _fits(manifest, memory, **asked | {name: value})
        assert not _fits(manifest, memory, **asked | {name: value + step})
    good = verdict_of(manifest, 10 * GB, None, kernels=True, **asked)
    assert good.fits and good.largest_context == 512 and good.largest_expert_budget is None
    assert "fits: needs" in good.sentence


def test_a_gpu_whose_memory_nobody_told_has_no_verdict(sample_bundle):
    told = verdict_of(sample_bundle.manifest, 10 * GB, None, backend="tensorrt", max_context=512)
    assert told.fits is None and told.largest_batch is None and "say --gpu-memory" in told.sentence
    assert verdict_of(sample_bundle.manifest, 10 * GB, 10 * GB, backend="tensorrt", max_context=512).fits
    assert verdict_of(sample_bundle.manifest, 10 * GB, GB // 2, backend="tensorrt", max_context=512).fits is False


def test_no_budget_is_told_where_none_is_kept(large, salient_llada):
    assert budget_that_fits(large, 3 * GB, None, backend="onnxruntime-cuda", max_context=64) is None
    assert budget_that_fits(salient_llada.manifest, 3 * GB, None, backend="onnxruntime", max_context=64) is None


@pytest.mark.parametrize("limit, expected", [(0, None), (1, 1), (6, 6), (100, 9)])
def test_most_is_the_last_good_number(limit, expected):
    assert most(1, 9, lambda number: number <= limit) == expected


def _run(*arguments):
    return CliRunner().invoke(main, [str(word) for word in arguments])


@pytest.mark.parametrize("verb", [("generate", "--prompt-ids", "5"), ("serve", "--port", "0", "--max-batch", "2")])
def test_the_verbs_refuse_before_they_open(sample_bundle, verb, monkeypatch):
    monkeypatch.setattr("dmoe_export.opening.open_bundle", None)  # not come to
    done = _run(verb[0], sample_bundle.folder, *verb[1:], "--backend", "onnxruntime", "--memory", "60M")
    rows = "2 answers" if verb[0] == "serve" else "1 answer"
    assert done.exit_code == 2 and f"of memory for {rows} at once of 64 tokens, there are 62.9 MB" in done.stderr


def test_a_memory_that_is_no_size(sample_bundle):
    done = _run("generate", sample_bundle.folder, "--prompt-ids", "5", "--memory", "lots")
    assert done.exit_code == 2 and "Memory 'lots' is no size" in done.stderr


def test_inspect_fit_as_json(sample_bundle):
    done = _run("inspect", sample_bundle.folder, "--fit", "--memory", "8G", "--gpu-memory", "24G", "--json", "--verify",
                "sizes")
    told = json.loads(done.stdout)["fit"]
    kinds = [(one["prediction"]["backend"], one["prediction"]["products"]) for one in told]
    assert kinds == [("onnxruntime", "exact"), ("onnxruntime", "fast"), ("onnxruntime-cuda", "exact"),
                     ("tensorrt", "exact")]
    assert all(one["fits"] and one["memory"] == 8 << 30 and one["gpu_memory"] == 24 << 30 for one in told)
    assert told[0]["host_bytes"] == sum(part["bytes"] for part in told[0]["prediction"]["parts"])
    assert told[0]["prediction"]["max_batch"] == 8 and told[0]["prediction"]["max_context"] == 512


def test_inspect_fit_in_words(sample_bundle):
    done = _run("inspect", sample_bundle.folder, "--fit", "--memory", "200M", "--max-batch", "64", "--verify", "sizes")
    assert "onnxruntime, exact does not fit: needs" in done.stdout and "tensorrt does not fit" in done.stdout
    assert done.stdout.count("(never compared with a GPU)") == 2


@pytest.mark.parametrize(("precision", "only_on_cpus", "budget", "left_out"), [
    ("fp32", False, None, set()), ("fp32", True, None, {"onnxruntime-cuda", "tensorrt"}),
    ("fp16", False, "50%", {"onnxruntime-cuda"}), ("bf16", False, "1G", {"onnxruntime", "onnxruntime-cuda"}),
    ("fp32", True, "1G", {"onnxruntime-cuda", "tensorrt"})])
def test_a_backend_without_a_prediction_says_why(precision, only_on_cpus, budget, left_out):
    words = {"fp32": "fp32, weights bf16"}.get(precision, precision)
    manifest = SimpleNamespace(precision=precision, only_on_cpus=only_on_cpus, precision_in_words=words)
    told = cannot_run(manifest, budget)
    assert told.keys() == left_out and all(told.values())


def test_what_fit_predicts_with_is_not_taken_without_it(sample_bundle):
    done = _run("inspect", sample_bundle.folder, "--max-context", "64", "--verify", "sizes")
    assert done.exit_code == 2 and "--max-context says what --fit is to predict with" in done.stderr
