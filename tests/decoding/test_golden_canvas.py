"""The recorded generations of DiffusionGemma, decision for decision, with the recorded draws."""

from __future__ import annotations

import numpy as np
import pytest
from canvas_loop import Recorded, RecordedBackend

from dmoe_export.decoding.batch import JoiningBatch
from dmoe_export.decoding.entropy_bound import entropy_bound

RUNS = range(3)


@pytest.fixture(scope="module")
def folder(golden):
    return golden.parent / "diffusion_gemma"


def decode(batch, runs, joined=None, watch=None):
    """Answers and last blocks of runs that join at once, or before the step that `joined` says."""
    tokens, last, handles, step = {run.run: [] for run in runs}, {}, {}, 0
    while len(batch) or len(handles) < len(runs):
        for i, run in enumerate(runs):
            if run.run not in handles and step >= (joined[i] if joined else 0):
                handles[run.run] = run.join(batch, watch)
                if isinstance(batch._backend, RecordedBackend):
                    batch._backend.runs[handles[run.run].serial] = run
        for done in batch.step():
            assert done.error is None, done.error
            tokens[done.handle.row.index] += done.token_ids
            last[done.handle.row.index] = done
        step += 1
    return tokens, last


def expect(run, tokens, last):
    ended = "eos" if len(run.answer) < run.meta["canvases"] * 32 else "length"
    assert tokens == run.answer and last.finish_reason == ended
    assert last.statistics.forwards_by_phase == {
        "prefill": 1, "full": 0, "denoise": run.meta["denoise"], "commit": run.meta["encode"] - 1}
    assert last.statistics.executed_forwards == last.statistics.forwards
    assert last.statistics.blocks == run.meta["canvases"] and last.statistics.new_tokens == len(tokens)


@pytest.mark.parametrize("number", RUNS)
def test_what_the_model_said_gives_the_recorded_canvases(folder, number):
    """The backend compares every canvas, temperature, draw and soft embedding that it is given."""
    run, backend, steps = Recorded(folder, number), RecordedBackend(), []
    tokens, last = decode(JoiningBatch(backend, 1), [run], watch=steps.append)
    expect(run, tokens[number], last[number])
    assert [*backend.progress.values()] == [run.meta["denoise"]]
    denoised = [step for step in steps if step.phase == "denoise"]
    for i, seen in enumerate(denoised):
        ends = i + 1 == len(denoised) or run.data["first_of_block"][i + 1]
        assert seen.candidates == run.data["argmax"][i].tolist()[:len(seen.candidates)]
        if not ends:
            assert seen.token_ids == [-1] * 32 and seen.new == np.flatnonzero(run.data["accepted"][i]).tolist()
            assert seen.step == i - max(np.flatnonzero(run.data["first_of_block"][:i + 1])) + 1


@pytest.mark.parametrize("joined", [(0, 0, 0), (0, 3, 7), (9, 4, 0)])
def test_rows_at_other_canvases_and_steps_change_nothing(folder, joined):
    runs = [Recorded(folder, number) for number in RUNS]
    tokens, last = decode(JoiningBatch(RecordedBackend(), 3), runs, joined)
    for run in runs:
        expect(run, tokens[run.run], last[run.run])


@pytest.mark.parametrize("number", RUNS)
def test_acceptance_of_every_recorded_step(folder, number):
    run = Recorded(folder, number)
    for entropy, accepted, sampled, again, after in zip(*(run.data[name] for name in (
            "entropy", "accepted", "sampled", "renoise_draw", "canvas_out")), strict=True):
        assert np.array_equal(entropy_bound(entropy, run.meta["entropy_bound"]), accepted)
        assert np.array_equal(np.where(accepted, sampled, again), after)
    assert [int(accepted.sum()) for accepted in run.data["accepted"]] == run.meta["accepted_per_step"]
