"""All recorded generations, token for token, with exactly the reference's forwards and its mean of unique experts."""

from __future__ import annotations

import json

import numpy as np
import pytest
from bundles import eager

from dmoe_export.decoding.loop import BlockDiffusion
from dmoe_export.decoding.settings import SCHEDULES, DecodeSettings
from dmoe_export.runtime.cpu.backend import OnnxRuntimeBackend


@pytest.fixture(scope="module")
def backends(golden, golden_bundle):
    return {"eager": eager(golden / "model"), "onnxruntime": OnnxRuntimeBackend(golden_bundle)}


def _decode(backend, prompts, settings):
    tokens = {i: [] for i in range(len(prompts))}
    last = {}
    for block in BlockDiffusion(backend, settings).decode(prompts):
        tokens[block.index] += block.token_ids
        last[block.index] = block
    return tokens, last


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["eager", "onnxruntime"])
@pytest.mark.parametrize("run", range(8))
def test_generation_equals_reference(golden, backends, run, name, schedule):
    meta = json.loads((golden / "generate.json").read_text())[run]
    data = np.load(golden / "generate.npz")
    settings = DecodeSettings(
        max_new_tokens=meta["gen"], steps=meta["steps"], threshold=meta["thr"], early_stop=meta["eos"],
        eos_id=meta.get("eos_id", None if meta["eos"] else -1), schedule=schedule)
    tokens, last = _decode(backends[name], [data[f"{run}.prompt"][0].tolist()], settings)
    want = data[f"{run}.tokens"][0].tolist()
    if meta["contains_prompt"]:
        want = want[meta["P"]:]
    got = tokens[0]
    if "eos_id" in meta:  # the reference returns the EOS, we name it as the reason
        assert last[0].finish_reason == "eos"
        got = [*got, meta["eos_id"]]
    else:
        assert last[0].finish_reason == "length"
    assert got == want
    statistics = last[0].statistics
    assert statistics.forwards == meta["forwards"]
    rode = statistics.forwards_by_phase["commit"] + (statistics.forwards_by_phase["prefill"] > 0)  # the last chunk
    assert statistics.executed_forwards == meta["forwards"] - rode * (schedule == "merged")
    assert statistics.unique_experts == pytest.approx(meta["avg_unique_experts"], abs=1e-6)
    assert statistics.new_tokens == len(tokens[0])


@pytest.mark.parametrize("name", ["eager", "onnxruntime"])
def test_batch_equals_each_row_alone(golden, backends, name):
    """Prompts of all lengths in one batch: rows prefill, denoise, commit and leave at different times."""
    data = np.load(golden / "generate.npz")
    prompts = [data[f"{run}.prompt"][0].tolist() for run in range(6)]
    settings = DecodeSettings(max_new_tokens=48, threshold=0.5, steps=8, eos_id=317)
    together, ends = _decode(backends[name], prompts, settings)
    for i, prompt in enumerate(prompts):
        alone, end = _decode(backends[name], [prompt], settings)
        assert together[i] == alone[0]
        assert ends[i].finish_reason == end[0].finish_reason
        assert ends[i].statistics.forwards == end[0].statistics.forwards
        assert ends[i].statistics.unique_experts == pytest.approx(end[0].statistics.unique_experts)
