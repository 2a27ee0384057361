"""The recorded generations of DiffusionGemma, decision for decision, with the recorded draws."""

from __future__ import annotations

import numpy as np
import pytest
from bundles import eager
from canvas_loop import Recorded, RecordedBackend

from dmoe_export.decoding.batch import JoiningBatch
from dmoe_export.decoding.entropy_bound import entropy_bound
from dmoe_export.runtime.cpu.backend import OnnxRuntimeBackend

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


class Listening:
    """A backend, and the entropies of each denoising forward of one row."""

    def __init__(self, backend):
        self._backend, self.entropies = backend, []

    def __getattr__(self, name):
        return getattr(self._backend, name)

    def forward(self, inputs, cache):
        outputs = self._backend.forward(inputs, cache)
        if inputs.canvas.denoise.all():
            self.entropies.append(outputs.canvas.entropy[0])
        return outputs


@pytest.fixture(scope="module")
def backends(folder, exported):
    return {"eager": eager(folder / "model", "token"),
            "onnxruntime": OnnxRuntimeBackend(exported(folder / "model"))}


@pytest.mark.parametrize("name", ["eager", "onnxruntime"])
@pytest.mark.parametrize("number", RUNS)
def test_generation_equals_the_reference(folder, backends, number, name):
    run, steps, backend = Recorded(folder, number), [], Listening(backends[name])
    tokens, last = decode(JoiningBatch(backend, 1), [run], watch=steps.append)
    expect(run, tokens[number], last[number])
    np.testing.assert_allclose(backend.entropies, run.data["entropy"], atol=2e-3)
    denoised = [step for step in steps if step.phase == "denoise"]
    for i, seen in enumerate(denoised):
        assert seen.candidates == run.data["argmax"][i].tolist()[:len(seen.candidates)]
        if not run.data["finished"][i] and seen.token_ids[0] == -1:
            assert seen.new == np.flatnonzero(run.data["accepted"][i]).tolist()


@pytest.mark.parametrize("name", ["eager", "onnxruntime"])
@pytest.mark.parametrize("joined", [(0, 0, 0), (0, 4, 9)])
def test_generations_of_a_batch_equal_the_reference(folder, backends, joined, name):
    """Rows of other lengths, that encode and denoise in one forward."""
    runs, backend = [Recorded(folder, number) for number in RUNS], Mixing(backends[name])
    tokens, last = decode(JoiningBatch(backend, 3), runs, joined)
    for run in runs:
        expect(run, tokens[run.run], last[run.run])
    assert backend.mixed


class Mixing(Listening):
    """Whether a forward had rows of both phases."""

    mixed = False

    def forward(self, inputs, cache):
        self.mixed |= 0 < inputs.canvas.denoise.sum() < len(inputs.canvas.denoise)
        return self._backend.forward(inputs, cache)
