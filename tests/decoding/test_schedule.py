"""The merged schedule against the reference's: the same tokens and model forwards, fewer forwards that run."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_caching import OPTIONS, PROMPTS
from toy_backend import N, Toy, decode

from dmoe_export.decoding.loop import BlockDiffusion
from dmoe_export.decoding.settings import SCHEDULES, DecodeSettings
from dmoe_export.runtime.backend import Limits

PLAIN = {"max_new_tokens": 12, "steps": 2, "acceptance": "fixed", "eos_id": -1}


def both(make, prompts, **options):
    """Tokens, last blocks and what ran, of the merged schedule and of the reference's."""
    found = []
    for schedule in SCHEDULES:
        toy = make()
        found.append((*decode(toy, prompts, schedule=schedule, **options), toy.seen))
    return found


def widths(seen):
    return [inputs.input_ids.shape[1] for inputs in seen]


@settings(max_examples=150, deadline=None)
@given(PROMPTS, OPTIONS, st.sampled_from([(None, None), (N, N), (2 * N, N), (2 * N, 2 * N), (3 * N, None)]))
def test_tokens_and_model_forwards_are_those_of_the_reference(prompts, options, limits):
    def make():
        toy = Toy()
        toy.limits = Limits(max_tokens=limits[0], step_tokens=limits[1])
        return toy

    merged, reference = both(make, prompts, **options)
    assert merged[0] == reference[0]
    assert max(widths(merged[2])) <= (limits[0] or 1000)
    assert len(merged[2]) <= len(reference[2])
    for mine, theirs in zip(merged[1], reference[1], strict=True):
        assert mine.finish_reason == theirs.finish_reason
        mine, theirs = mine.statistics, theirs.statistics
        assert mine.forwards_by_phase == theirs.forwards_by_phase and mine.edits == theirs.edits
        assert theirs.executed_forwards == theirs.forwards == sum(theirs.forwards_by_phase.values())
        rode = mine.executed_by_phase["prefill+denoise"] + mine.executed_by_phase["commit+denoise"]
        assert mine.executed_forwards == mine.forwards - rode


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(3, 20), min_size=1, max_size=10), OPTIONS)
def test_alone_no_commit_and_no_last_chunk_runs_by_itself(prompt, options):
    statistics = decode(Toy(), [prompt], **options)[1][0].statistics
    assert statistics.executed_by_phase["prefill"] == statistics.executed_by_phase["commit"] == 0
    assert statistics.executed_by_phase["prefill+denoise"] == (len(prompt) >= N)


def test_what_runs():
    """Prompt of two blocks, three of answer, two steps each: 9 model forwards, 6 that run."""
    merged, reference = both(Toy, [[7] * 8], **PLAIN)
    spans = [(int(i.position_ids[0, 0]), int(i.position_ids[0, -1]) + 1, i.want_keys_values) for i in merged[2]]
    assert spans == [(0, 12, True), (8, 12, False), (8, 16, True), (12, 16, False), (12, 20, True), (16, 20, False)]
    statistics = merged[1][0].statistics
    assert statistics.forwards == len(reference[2]) == 9 and statistics.executed_forwards == len(merged[2]) == 6
    assert statistics.forwards_by_phase == {"prefill": 1, "full": 0, "denoise": 6, "commit": 2}
    assert statistics.executed_by_phase == {"prefill": 0, "full": 0, "denoise": 3, "commit": 0, "prefill+denoise": 1,
                                            "commit+denoise": 2}
    assert statistics.tokens_per_forward == 12 / 9
    told = statistics.as_dict()
    assert told["forwards"] == 9 and told["executed_forwards"] == 6
    assert {ran for ran, seconds in told["seconds_by_phase"].items() if seconds} == {
        "denoise", "prefill+denoise", "commit+denoise"}


@pytest.mark.parametrize("max_tokens, step_tokens, ran", [
    (None, None, [12, 4, 8, 4, 8, 4]),  # all rides
    (8, None, [8, 4, 4, 8, 4, 8, 4]),  # two blocks of prompt and one of answer are too many
    (16, 4, [12, 4, 4, 4, 4, 4, 4, 4]),  # an engine made for the reference's schedule: only its prefills are wide
    (4, 4, [4] * 10)])  # nothing fits beside a block
def test_what_does_not_fit_runs_by_itself(max_tokens, step_tokens, ran):
    def make():
        toy = Toy()
        toy.limits = Limits(max_tokens=max_tokens, step_tokens=step_tokens)
        return toy

    merged, reference = both(make, [[7] * 8], **PLAIN)
    assert widths(merged[2]) == ran and merged[0] == reference[0]
    assert merged[1][0].statistics.executed_forwards == len(ran)


def test_a_last_chunk_of_the_full_size_rides_too():
    """Chunks are those of the reference, whatever rides: 512, then 512 and the block."""
    assert widths(both(Toy, [[7] * 1024], **PLAIN | {"max_new_tokens": 4})[0][2]) == [512, 516, 4]


def test_rides_need_half_of_the_rows_where_they_widen_the_forward():
    """Rows in step: every commit rides. One row out of step of three: its commit is a forward as narrow as theirs."""
    assert widths(both(Toy, [[7] * 8] * 3, **PLAIN)[0][2]) == [12, 4, 8, 4, 8, 4]
    prompts = [[7] * 8, [7] * 8, [7] * 9]

    def uneven(schedule):
        toy, counts = Toy(), []
        loop = BlockDiffusion(toy, DecodeSettings(**PLAIN | {"steps": 4, "schedule": schedule}))
        # The third row has three places to fill, so three steps where the others have four.
        for block in loop.decode(prompts):
            counts.append((block.index, block.statistics.executed_by_phase["commit"]))
        return toy.seen, dict(counts)

    seen, commits = uneven("merged")
    assert commits[2] > 0 and commits[0] == commits[1] == 0
    assert len(seen) < len(uneven("reference")[0])


def test_rides_that_widen_nothing_always_ride():
    """The longest prompt's first chunk is wider than a short prompt with its first block."""
    seen = both(Toy, [[7] * 600, *[[7] * 6] * 7], **PLAIN)[0][2]
    first = seen[0].position_ids
    assert first.shape[1] == 512 and ((first >= 0).sum(axis=1) == [512] + [8] * 7).all()
    assert (seen[0].logit_rows[1:] >= 0).sum(axis=1).tolist() == [2] * 7


def test_other_caches_and_models_run_as_they_did():
    for make, cache in ((Toy, "none"), (lambda: Toy("full"), "prefix"), (lambda: Toy("full"), "dual")):
        merged, reference = both(make, [[7] * 9, [8]], cache=cache, **PLAIN)
        assert merged[0] == reference[0] and widths(merged[2]) == widths(reference[2])
        assert all(end.statistics.executed_forwards == end.statistics.forwards for end in merged[1])


def test_expert_bytes_are_counted_once_and_experts_per_model_forward():
    from test_loop import Scripted

    class Own(Scripted):
        """Token i uses expert i % 4 in blocks of even number, i % 2 in the others."""

        def forward(self, inputs, cache):
            outputs = super().forward(inputs, cache)
            many = np.where(inputs.position_ids // N % 2 == 0, 4, 2)
            outputs.expert_ids[0, ..., 0] = np.where(inputs.position_ids >= 0, inputs.position_ids % many, -1)
            return outputs

    def statistics(schedule):
        loop = BlockDiffusion(Own(), DecodeSettings(max_new_tokens=8, eos_id=-1, schedule=schedule), 10)
        return list(loop.decode([[7] * 4]))[-1].statistics

    merged, reference = statistics("merged"), statistics("reference")
    assert merged.unique_by_phase == reference.unique_by_phase == {
        "prefill": [4.0], "full": [], "denoise": [2.0, 4.0], "commit": [2.0]}
    assert reference.expert_bytes_touched == 12 * 10 and merged.expert_bytes_touched == 8 * 10
