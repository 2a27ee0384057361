"""The merged schedule on models: what a ride gives is what two forwards give, and answers are the same."""

from __future__ import annotations

import json

import numpy as np
import pytest
from bundles import eager
from conftest import SAMPLE

from dmoe_export.generator import Generator
from dmoe_export.runtime.backend import ForwardInputs
from dmoe_export.runtime.cpu.backend import OnnxRuntimeBackend

QUESTIONS = [json.loads(line)["question"] for line in (SAMPLE / "held_out.jsonl").read_text().splitlines()]
# Keys and values; logits. Alone the order of sums differs: our kernels choose theirs by the number of tokens.
CLOSE = {"kernels": (2e-5, 1e-4), "bodies": (0.0, 1e-4), "eager": (2e-5, 1e-4)}


@pytest.fixture(params=CLOSE)
def backend(request, sample_bundle):
    if request.param == "eager":
        return request.param, eager(SAMPLE)
    return request.param, OnnxRuntimeBackend(sample_bundle, 1, cpu_ops="on" if request.param == "kernels" else "off")


def test_a_ride_is_two_forwards(backend):
    """Random blocks behind 0 to 3 cached ones: a finished block and a half masked one, together and one by one."""
    kind, model = backend
    n, d = model.routing.block_length, model.description
    for case in range(6):
        rng = np.random.default_rng(case)
        start = case % 4 * n
        ids = rng.integers(0, d.mask_id, start + 2 * n)
        ids[start + n:][rng.random(n) < 0.6] = d.mask_id

        def forward(cache, low, high, rows, ids=ids):
            inputs = ForwardInputs(ids[None, low:high], np.arange(low, high)[None], np.asarray(rows)[None], {}, True,
                                   True)
            return inputs, model.forward(inputs, cache)

        together, apart = model.new_cache(1), model.new_cache(1)
        for cache in (together, apart) if start else ():
            cache.commit(*forward(cache, 0, start, [-1]), np.ones((1, start), bool))
        inputs, rode = forward(together, start, start + 2 * n, np.arange(n, 2 * n))
        together.commit(inputs, rode, np.arange(2 * n)[None] < n)
        inputs, committed = forward(apart, start, start + n, [-1])
        apart.commit(inputs, committed, np.ones((1, n), bool))
        _, step = forward(apart, start + n, start + 2 * n, np.arange(n))
        assert (together.positions == apart.positions).all()
        for mine, theirs in zip((*together.keys, *together.values), (*apart.keys, *apart.values), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=0, atol=CLOSE[kind][0])
        np.testing.assert_allclose(rode.logits, step.logits, rtol=0, atol=CLOSE[kind][1])
        assert (rode.token_ids == step.token_ids).all()
        assert (rode.expert_ids == np.concatenate([committed.expert_ids, step.expert_ids], axis=2)).all()


@pytest.fixture(scope="module")
def generators(sample_bundle):
    with (Generator.open(sample_bundle.folder, backend="onnxruntime") as plain,
          Generator.open(sample_bundle.folder, backend="onnxruntime", experts_per_layer=6) as budget):
        yield {"plain": plain, "budget": budget}


@pytest.mark.parametrize("place", ["plain", "budget"])
@pytest.mark.parametrize("options", [
    {"max_new_tokens": 70, "eos_id": -1}, {"max_new_tokens": 70, "eos_id": -1, "acceptance": "fixed", "steps": 4},
    {"max_new_tokens": 70, "edit_threshold": 0.6, "steps": 2, "eos_id": -1},
    {"max_new_tokens": 70, "edit_threshold": 0.6, "edit_passes": 0, "eos_id": -1},
    {"max_new_tokens": 100, "stop": ["1", "e "], "eos_id": -1},
    {"max_new_tokens": 40, "temperature": 0.8, "seed": 5}, {"max_new_tokens": 40, "coreset_top_p": 0.3}])
def test_answers_are_those_of_the_reference(generators, place, options):
    """Alone, and as a batch whose rows are at different places."""
    questions = [*QUESTIONS[:3], [7, 9, 8] * 40]
    merged, reference = (generators[place].generate(questions, schedule=schedule, **options)
                         for schedule in ("merged", "reference"))
    (alone,) = generators[place].generate(questions[-1], **options | {"seed": options.get("seed", 0) + 3})
    for mine, theirs in zip([*merged, alone], [*reference, reference[-1]], strict=True):
        assert (mine.token_ids, mine.text, mine.finish_reason) == (theirs.token_ids, theirs.text, theirs.finish_reason)
        assert mine.stats.forwards_by_phase == theirs.stats.forwards_by_phase
        assert mine.stats.executed_forwards <= theirs.stats.executed_forwards == theirs.stats.forwards
    assert alone.stats.executed_by_phase["commit"] == alone.stats.executed_by_phase["prefill"] == 0


def test_the_sample_answers_with_fewer_forwards(generators):
    """Held-out questions: the same tokens (all 400 were tried)."""
    merged, reference = ([generators["plain"].generate(question, max_new_tokens=40, schedule=schedule)[0]
                          for question in QUESTIONS[::10]] for schedule in ("merged", "reference"))
    assert [answer.token_ids for answer in merged] == [answer.token_ids for answer in reference]
    assert sum(a.stats.executed_forwards for a in merged) < 0.85 * sum(a.stats.executed_forwards for a in reference)
