"""Multi-block editing: finished blocks stay open and see later ones (LLaDA2.1, arXiv 2602.08676, section 4.3)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_editing import Script
from toy_backend import EOS, MASK, N, Toy, decode

from dmoe_export.decoding.batch import JoiningBatch
from dmoe_export.decoding.settings import DecodeSettings
from dmoe_export.errors import RequestError

PROMPTS = st.lists(st.lists(st.integers(3, 20), min_size=1, max_size=10), min_size=1, max_size=3)
OPTIONS = st.fixed_dictionaries({
    "max_new_tokens": st.integers(1, 22), "steps": st.sampled_from([1, 2, 4]), "edit_blocks": st.integers(1, 3),
    "acceptance": st.sampled_from(["threshold", "fixed", "hierarchy"]), "threshold": st.sampled_from([0.0, 0.6, 1.0]),
    "edit_threshold": st.sampled_from([0.0, 0.5, 1.0]), "edit_passes": st.sampled_from([0, 1, 3]),
    "penalty_lambda": st.sampled_from([0.0, 2.0]), "temperature": st.sampled_from([0.0, 0.0, 1.5]),
    "eos_id": st.sampled_from([None, -1]), "seed": st.integers(0, 5)})


@settings(max_examples=60, deadline=None)
@given(PROMPTS, OPTIONS, st.sampled_from([None, 4, 8, 12]))
def test_the_block_cache_is_exact(prompts, options, step_tokens):
    """What leaves the window is cached as a finished block is: of itself and what is before it."""
    plain, *cached = (decode(toy, prompts, **how, **options) for toy, how in (
        (Toy(), {"cache": "none"}), (Toy(), {}), (Toy(), {"schedule": "reference"}),
        (Toy(max_tokens=16, step_tokens=step_tokens), {})))
    for one in cached:
        assert one[0] == plain[0]
        for mine, theirs in zip(one[1], plain[1], strict=True):
            assert mine.finish_reason == theirs.finish_reason and mine.statistics.edits == theirs.statistics.edits
            assert mine.statistics.blocks == theirs.statistics.blocks
            assert mine.statistics.forwards_by_phase["denoise"] == theirs.statistics.forwards_by_phase["full"]


@settings(max_examples=40, deadline=None)
@given(PROMPTS, OPTIONS)
def test_rows_do_not_depend_on_their_neighbours(prompts, options):
    together = decode(Toy(), [*prompts, [5] * 6], **options)
    for i, prompt in enumerate(prompts):
        assert together[0][i] == decode(Toy(), [prompt], **{**options, "seed": options["seed"] + i})[0][0]


@settings(max_examples=40, deadline=None)
@given(PROMPTS, OPTIONS)
def test_answers_are_whole(prompts, options):
    tokens, last = decode(Toy(), prompts, **options)
    for answer, end in zip(tokens, last, strict=True):
        assert MASK not in answer and len(answer) == end.statistics.new_tokens <= options["max_new_tokens"]
        assert (end.finish_reason == "length") == (len(answer) == options["max_new_tokens"])


def _said(*tokens, confidence=0.9):
    return {place: (token, confidence) for place, token in enumerate(tokens)}


FIRST, SECOND = _said(10, 11, 12, 13), _said(10, 21, 12, 13, 14, 15, 16, 17)


def test_a_finished_block_is_edited_when_a_later_one_is_there():
    """A prompt of one token. Forwards: fill, look over; fill the next block and edit the first, look over."""
    script, options = (FIRST, FIRST, SECOND, SECOND), {"max_new_tokens": 7, "threshold": 0.5, "edit_threshold": 0.5}
    toy = Script(*script)
    tokens, last = decode(toy, [[7]], edit_blocks=1, **options)
    assert tokens == [[21, 12, 13, 14, 15, 16, 17]]
    assert last[0].statistics.edits == 1 and last[0].statistics.blocks == 2
    assert [i.input_ids.shape[1] for i in toy.seen] == [N, N, 2 * N, 2 * N]
    assert toy.seen[2].attention_positions.tolist() == [[2 * N - 1] * (2 * N)]
    assert toy.seen[2].logit_rows.tolist() == [[4, 5, 6, 7, 1, 2, 3]]  # gaps, then what may be edited
    assert not any(i.want_keys_values for i in toy.seen)  # nothing leaves the window
    assert decode(Script(*script), [[7]], **options)[0] == [[11, 12, 13, 14, 15, 16, 17]]


def test_a_block_is_given_once_it_has_left_the_window():
    options = {"max_new_tokens": 16, "threshold": 0.0, "edit_threshold": 1.0, "eos_id": -1}
    for open_blocks in (0, 1, 2, 3):
        batch, given = JoiningBatch(Toy(), 1), []
        handle = batch.add([7] * 4, DecodeSettings(edit_blocks=open_blocks, **options))
        while len(batch):
            given += [(handle.row.block, len(done.token_ids)) for done in batch.step()]
        wanted = [(block, 4) for block in range(open_blocks, 3)] + [(3, 4 * (open_blocks + 1))]
        assert given == wanted
        assert handle.row.statistics.blocks == 4


def test_what_rides_along_does_not_see_the_window():
    toy = Toy()
    decode(toy, [[7] * 4], max_new_tokens=12, threshold=0.0, edit_threshold=1.0, edit_passes=0, edit_blocks=1,
           eos_id=-1)
    assert [(i.position_ids[0].tolist(), i.attention_positions[0].tolist()) for i in toy.seen] == [
        ([*range(8)], [0, 1, 2, 3, 7, 7, 7, 7]), ([*range(4, 12)], [11] * 8),
        ([*range(4, 16)], [4, 5, 6, 7, *[15] * 8])]


def test_a_token_that_becomes_the_end_ends_the_answer():
    ended = _said(10, 11, EOS, 13, 14, 15, 16, 17)
    tokens, last = decode(Script(FIRST, FIRST, ended), [[7]], max_new_tokens=15, threshold=0.5, edit_threshold=0.5,
                          edit_blocks=1)
    assert tokens == [[11]] and last[0].finish_reason == "eos" and last[0].statistics.new_tokens == 1


def test_cancelled_in_the_middle_it_gives_its_finished_blocks():
    options = {"max_new_tokens": 15, "threshold": 0.5, "edit_threshold": 0.5, "edit_blocks": 2}
    third = _said(10, 21, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21)
    half = {place: (token, 0.9 if place < 10 else 0.1) for place, (token, _) in third.items()}
    batch = JoiningBatch(Script(FIRST, FIRST, SECOND, SECOND, half), 1)
    handle = batch.add([7], DecodeSettings(**options))
    for _ in range(5):
        assert batch.step() == []
    batch.cancel(handle)
    done, = batch.step()
    assert done.token_ids == [21, 12, 13, 14, 15, 16, 17] and done.finish_reason == "cancelled"
    assert done.statistics.new_tokens == 7 and done.statistics.blocks == 2


def test_a_watcher_sees_the_window():
    seen = []
    batch = JoiningBatch(Script(FIRST, FIRST, SECOND, SECOND), 1)
    settings = DecodeSettings(max_new_tokens=7, threshold=0.5, edit_threshold=0.5, edit_blocks=1)
    batch.add([7], settings, watch=seen.append)
    while len(batch):
        batch.step()
    assert [(step.start, step.token_ids) for step in seen[1:3]] == [
        (0, [11, 12, 13]), (0, [21, 12, 13, 14, 15, 16, 17])]
    assert seen[2].new == [0, 3, 4, 5, 6] and np.allclose(seen[2].confidence, 0.9)


@pytest.mark.parametrize(("options", "message"), [
    ({}, "edit_blocks belongs to editing; give edit_threshold .such as 0., too"),
    ({"edit_threshold": 0.5, "insert_delete": True}, "edit_blocks does not go with insert_delete"),
    ({"edit_threshold": 0.5, "salient_threshold": 0.9}, "edit_blocks does not go with salient_threshold"),
    ({"edit_threshold": 0.5, "edit_blocks": 4}, "edit_blocks is 4, it must be between 0 and 3")])
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(RequestError, match=message):
        DecodeSettings(**{"edit_blocks": 1, **options})


def test_a_graph_that_cannot_is_refused():
    for toy, message in ((Toy("full"), r"export it again with --multi-block-editing"),
                         (Toy(max_tokens=8), r"forwards of 12 tokens, the engine takes at most 8")):
        with pytest.raises(RequestError, match=message):
            decode(toy, [[7] * 4], edit_threshold=0.5, edit_blocks=2, max_new_tokens=20)
