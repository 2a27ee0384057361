"""Editing against recordings of SGLang's `JointThreshold` and `JointThresholdInDel`, step by step."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scripted import Scripted

from dmoe_export.decoding.batch import JoiningBatch
from dmoe_export.decoding.settings import DecodeSettings


@pytest.fixture(scope="module")
def recorded(golden):
    folder = golden.parent / "editing"
    return json.loads((folder / "steps.json").read_text()), np.load(folder / "steps.npz")


def run(case, told, data, cache="auto", schedule="merged", lead=None, **options):
    """The block after each step, as far as the batch went on, and the batch's last word; the block begins at `lead`."""
    n, at = case["block"], case["case"]
    lead = n if lead is None else lead
    logits, start = data[f"{at}.logits"], data[f"{at}.start"]

    def says(step, positions, ids):
        said = np.zeros((len(positions), told["vocabulary"]), np.float32)
        inside = positions >= lead
        said[inside] = logits[min(step, len(logits) - 1), positions[inside] - lead]
        return said

    backend = Scripted(says, n, told["vocabulary"], told["mask"], (19,), (told["delete"], told["split"]))
    batch = JoiningBatch(backend, 1)
    prompt = [3] * lead + start[:case["prompt"]].tolist()
    handle = batch.add(prompt, DecodeSettings(
        max_new_tokens=n - case["prompt"], eos_id=-1, threshold=case["threshold"], steps=32 + n,
        edit_threshold=case["edit_threshold"], edit_passes=case["max_post_edit_steps"],
        penalty_lambda=case.get("penalty_lambda", 0.0), insert_delete=case["kind"] == "indel", cache=cache,
        schedule=schedule, **options))
    blocks, done = [], []
    while not done:
        before = backend.count
        done = batch.step()
        if backend.count > before:
            blocks.append(handle.row.canvas[lead:lead + n].copy())
    return blocks, done[0], backend


@pytest.mark.parametrize("number", range(24))
@pytest.mark.parametrize(("cache", "schedule"), [("block", "merged"), ("block", "reference"), ("none", "merged")])
def test_every_step_is_the_recorded_one(recorded, number, cache, schedule):
    told, data = recorded
    case = told["cases"][number]
    blocks, last, backend = run(case, told, data, cache, schedule)
    want = data[f"{number}.tokens"]
    assert len(blocks) <= len(want) and (np.array(blocks) == want[:len(blocks)]).all()
    assert (want[len(blocks) - 1:] == blocks[-1]).all()  # a recorded step more, that finds nothing to change
    assert len(want) - len(blocks) <= 1
    assert last.token_ids == want[-1].tolist()[case["prompt"]:] and last.finish_reason == "length"
    # Nothing that crosses to the host is as large as the logits, but where a penalty needs them.
    assert any(inputs.want_logits for inputs in backend.seen) == bool(case.get("penalty_lambda"))
