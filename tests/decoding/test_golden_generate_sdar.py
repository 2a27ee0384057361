"""All recorded generations of SDAR: tokens, every step of every block, and the reference's forwards less one.

The reference caches the last block, too, after which nothing is decoded; we never do. It fills whole blocks beyond what
was asked for, so as many tokens are asked for here.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from bundles import eager

from dmoe_export.decoding.batch import JoiningBatch
from dmoe_export.decoding.settings import SCHEDULES, DecodeSettings
from dmoe_export.runtime.cpu.backend import OnnxRuntimeBackend


@pytest.fixture(scope="module")
def folder(golden):
    return golden.parent / "sdar_moe"


@pytest.fixture(scope="module")
def backends(folder, exported):
    """By name and block length."""
    model = folder / "model"
    return {("eager", n): eager(model, "token", block_length=n) for n in (4, 8)} | {
        ("onnxruntime", n): OnnxRuntimeBackend(exported(model, block_length=n)) for n in (4, 8)}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["eager", "onnxruntime"])
@pytest.mark.parametrize("run", range(6))
def test_generation_equals_the_reference(folder, backends, run, name, schedule):
    meta = json.loads((folder / "generate.json").read_text())[run]
    data = np.load(folder / "generate.npz")
    prompt, want = data[f"{run}.prompt"][0].tolist(), data[f"{run}.tokens"][0, meta["P"]:].tolist()
    kept = {"dynamic": {"acceptance": "threshold", "threshold": meta["threshold"]},
            "static": {"acceptance": "fixed"}}[meta["rule"]]
    settings = DecodeSettings(max_new_tokens=len(want), steps=meta["steps"], schedule=schedule, early_stop=False,
                              eos_id=meta["eos"] or -1, **kept)
    batch, tokens, seen, last = JoiningBatch(backends[name, meta["block"]], 1), [], [], None
    batch.add(prompt, settings, watch=seen.append)
    while len(batch):
        for last in batch.step():
            tokens += last.token_ids
    assert last.error is None
    if meta["eos"]:
        end = next(i for i, token in enumerate(want) if token in meta["eos"])
        assert (tokens, last.finish_reason) == (want[:end], "eos")
    else:
        assert (tokens, last.finish_reason) == (want, "length")
    forwards, merged = last.statistics.forwards_by_phase, schedule == "merged"
    assert forwards == {"prefill": meta["prefill"], "denoise": meta["denoise"], "commit": meta["commit"] - 1, "full": 0}
    assert last.statistics.forwards == meta["forwards"] - 1
    assert last.statistics.executed_forwards == (meta["denoise"] if merged else meta["forwards"] - 1)
    _check_steps(data[f"{run}.steps"], seen, meta)


def _check_steps(recorded, seen, meta):
    """Recorded are blocks as a denoise or commit forward saw them; what we see is what a denoise forward left behind.

    So each of ours is the next of theirs: of the same block, a later step or its commit.
    """
    begins = np.r_[True, (recorded[:-1] != 319).all(1)]
    block = np.cumsum(begins) - 1
    theirs = [(b, row) for b, row, first in zip(block, recorded, begins, strict=True) if not first]
    ours = [step for step in seen if step.phase.endswith("denoise")]
    assert len(ours) == len(theirs) == meta["denoise"]
    for step, (number, row) in zip(ours, theirs, strict=True):
        prompt = max(0, meta["P"] - (meta["P"] // meta["block"] + step.block) * meta["block"])
        assert step.block == number
        shown = row[prompt:prompt + len(step.token_ids)]  # less than a block where an end token came
        assert step.token_ids == np.where(shown == 319, -1, shown).tolist()


def test_watch_shows_as_many_places_as_the_answer_has(folder, backends):
    """The check above cannot pass by showing nothing."""
    data, seen = np.load(folder / "generate.npz"), []
    batch = JoiningBatch(backends["onnxruntime", 4], 1)
    batch.add(data["1.prompt"][0].tolist(), DecodeSettings(max_new_tokens=34, steps=4, eos_id=-1), watch=seen.append)
    while len(batch):
        batch.step()
    assert {len(step.token_ids) for step in seen} == {2, 4}
