"""`check` of a model with a canvas: both phases pass, and draws that are not those of the logits are found."""

from __future__ import annotations

import numpy as np
import pytest

from dmoe_export.bundle.reader import Bundle
from dmoe_export.check import runners
from dmoe_export.check.canvas_inputs import prefixes
from dmoe_export.check.compare import _places
from dmoe_export.check.draws import compare_draws, mean_difference
from dmoe_export.check.gates import LIMITS
from dmoe_export.check.run import check_bundle
from dmoe_export.errors import RequestError


@pytest.fixture(scope="module")
def folder(golden):
    return golden.parent / "diffusion_gemma" / "model"


@pytest.fixture(scope="module")
def bundle(folder, exported) -> Bundle:
    return exported(folder)


def _check(bundle, **options):
    return check_bundle(bundle.folder, backends=["onnxruntime"], weights=False, **options)


def test_a_right_bundle_passes(bundle, folder):
    report = _check(bundle, reference=folder)
    assert report.passed, report.verdict
    (backend,) = report.backends
    assert not backend.layers_alone and len(backend.layers_in_sequence) == 3 and not backend.generations
    gates = {(gate.where, gate.name): gate.value for gate in backend.gates}
    assert gates["draws in sequence", "ids that the logits and the draws do not give"] == 0
    assert gates["draws in sequence", "mean difference of entropy, nats"] < 1e-5
    assert gates["soft embeddings in sequence", "mean cosine"] > 1 - 1e-9
    assert report.inputs.rows == 4 and report.inputs.masked == 120  # the last row of 32 is a quarter shorter


@pytest.mark.parametrize("part, gate", [
    ("sampled_ids", "ids that the logits and the draws do not give"), ("entropy", "mean difference of entropy, nats"),
    ("soft_embeddings", "mean cosine")])
def test_wrong_draws_are_found(bundle, monkeypatch, part, gate):
    right = runners.named_outputs

    def wrong(out, layers):
        named = right(out, layers)
        name = "next_soft_embeddings" if part == "soft_embeddings" else part
        named[name] = np.roll(named[name], 1, axis=1) if part != "entropy" else named[name] + np.float32(0.1)
        return named

    monkeypatch.setattr(runners, "named_outputs", wrong)
    report = _check(bundle)
    assert not report.passed
    assert next(g.name for g in report.backends[0].gates if not g.passed) == gate


def _forward(rng, places=50, vocabulary=40):
    logits = rng.normal(size=(1, places, vocabulary)).astype(np.float32)
    temperature, uniform = np.array([0.7], np.float32), rng.random((1, places), np.float32)
    z = logits.astype(np.float64) / 0.7
    probs = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    ids = (np.cumsum(probs, -1) > uniform[..., None]).argmax(-1)
    return {"logits": logits, "temperature": temperature, "uniform": uniform, "sampled_ids": ids,
            "entropy": -(probs * np.log(probs)).sum(-1).astype(np.float32),
            "logit_rows": np.arange(places)[None]}


def test_ids_are_held_against_the_backend_s_own_logits():
    rng = np.random.default_rng(0)
    right = _forward(rng)
    assert compare_draws(right, right, LIMITS["fp32"])
    moved = right | {"sampled_ids": np.where(right["sampled_ids"] > 20, right["sampled_ids"] - 1,
                                             right["sampled_ids"] + 1)}
    found = compare_draws(right, moved, LIMITS["fp32"])
    assert not found and found.unexplained > 40 and not found.same.any()
    other = _forward(rng) | {name: right[name] for name in ("uniform", "temperature")}
    z = np.cumsum(np.exp(other["logits"].astype(np.float64) / 0.7), -1)
    other["sampled_ids"] = (z / z[..., -1:] > right["uniform"][..., None]).argmax(-1)
    assert compare_draws(right, other, LIMITS["fp32"]).unexplained == 0  # its own logits, though other ones
    nothing = right | {"logits": np.full_like(right["logits"], np.nan)}
    assert compare_draws(right, nothing, LIMITS["fp32"]).unexplained == 50


def test_an_entropy_that_is_no_number_is_far_off():
    right = _forward(np.random.default_rng(0))
    wrong = right | {"entropy": np.full_like(right["entropy"], np.nan)}
    assert mean_difference([compare_draws(right, wrong, LIMITS["fp32"])]) == 1e30


def test_prompts_are_longer_than_the_window_where_there_is_room(bundle):
    d = bundle.manifest.model
    assert max(prefixes(d, 10**6)[0], 0) == 16 + 3
    assert prefixes(d, 40) == [8, 8, 8, 2]
    with pytest.raises(RequestError, match=r"The model takes 32 positions, no more than a canvas of 32\."):
        prefixes(d, 32)


def test_blocks_of_a_canvas_count_from_its_start():
    """As in the graph: tokens that routing puts into one block are told from those that it does not."""
    feed = {"position_ids": np.array([[5, 6, 7, -1], [5, 6, 7, 8]]), "denoise": np.array([True, False])}
    assert _places(feed).tolist() == [[0, 1, 2, -1], [5, 6, 7, 8]]
    assert _places({"position_ids": feed["position_ids"]}) is feed["position_ids"]
