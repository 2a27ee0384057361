"""Rows that end before their time: told so, out of time, cancelled."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from toy_backend import Toy

from dmoe_export.decoding import batch as batch_module
from dmoe_export.decoding.loop import BlockDiffusion
from dmoe_export.decoding.settings import DecodeSettings

PROMPTS = [[5] * 3, [6] * 9, [7] * 4]
FREE = {"max_new_tokens": 20, "eos_id": -1}


def blocks_of(backend, prompts, cancelled=lambda: False, ends=None, **options):
    found = [[] for _ in prompts]
    for block in BlockDiffusion(backend, DecodeSettings(**FREE | options)).decode(prompts, cancelled, ends):
        found[block.index].append(block)
    return found


def ids(blocks):
    return [token for block in blocks for token in block.token_ids]


@pytest.mark.parametrize("attention", ["block_causal", "full"])
@pytest.mark.parametrize("kept", [0, 2, 4])
def test_a_row_that_is_told_to_end_ends_and_the_others_do_not(attention, kept):
    free = blocks_of(Toy(attention), PROMPTS)
    count = [0, 0, 0]

    def ends(index, tokens, last):
        assert last == (len(free[index]) == count[index] + 1)
        count[index] += 1
        return min(kept, len(tokens)) if (index, count[index]) == (1, 2) else None

    backend = Toy(attention)
    told = blocks_of(backend, PROMPTS, ends=ends)
    before = len(free[1][0].token_ids)
    assert ids(told[1]) == ids(free[1])[:before + min(kept, len(free[1][1].token_ids))]
    assert [block.finish_reason for block in told[1]] == [None, "stop"]
    assert told[1][-1].statistics.new_tokens == len(ids(told[1])) and told[1][-1].statistics.blocks == 2
    for i in (0, 2):
        assert ids(told[i]) == ids(free[i]) and told[i][-1].finish_reason == "length"
    forwards = told[1][-1].statistics.forwards
    assert forwards < free[1][-1].statistics.forwards  # nothing was decoded for it afterwards


def test_a_last_block_may_hold_an_end_too():
    (free,) = blocks_of(Toy(), PROMPTS[:1])
    (told,) = blocks_of(Toy(), PROMPTS[:1], ends=lambda index, tokens, last: 1 if last else None)
    assert told[-1].finish_reason == "stop" and ids(told) == ids(free[:-1]) + free[-1].token_ids[:1]


@pytest.mark.parametrize("after, schedule", [(0, "merged"), (1, "merged"), (3, "merged"), (5, "reference"),
                                             (9, "reference")])
def test_cancelling_is_asked_between_forwards(after, schedule):
    """The rows then end with the blocks they have: those of an answer that nobody cancelled."""
    free, backend, asked = blocks_of(Toy(), PROMPTS, threshold=0.1), Toy(), []

    def cancelled():
        asked.append(len(backend.seen))
        return len(backend.seen) == after

    found = blocks_of(backend, PROMPTS, cancelled, threshold=0.1, schedule=schedule)
    assert asked == list(range(after + 1)) and len(backend.seen) == after
    for mine, whole in zip(found, free, strict=True):
        assert mine[-1].finish_reason == "cancelled" and mine[-1].token_ids == []
        assert [b.token_ids for b in mine[:-1]] == [b.token_ids for b in whole[:len(mine) - 1]]
        assert mine[-1].statistics.blocks == len(mine) - 1
        assert mine[-1].statistics.new_tokens == len(ids(mine))
    assert (after == 0) == (not any(len(mine) > 1 for mine in found)) or after == 1


def test_rows_that_have_ended_stay_so_when_the_rest_is_cancelled():
    backend = Toy()
    found = blocks_of(backend, PROMPTS, lambda: len(backend.seen) >= 12,
                      ends=lambda index, tokens, last: 0 if index == 0 else None)
    assert [mine[-1].finish_reason for mine in found] == ["stop", "cancelled", "cancelled"]


@pytest.mark.parametrize("seconds", [0.5, 3, 7.5, 1000])
def test_a_time_limit_is_looked_at_between_forwards(monkeypatch, seconds):
    """On a clock that goes on by a second with every forward."""
    free, backend = blocks_of(Toy(), PROMPTS), Toy()
    monkeypatch.setattr(batch_module, "time", SimpleNamespace(
        perf_counter=lambda: 0.0, monotonic=lambda: 100.0 + len(backend.seen)))
    found = blocks_of(backend, PROMPTS, time_limit=seconds)
    assert len(backend.seen) == -(-seconds // 1) or seconds == 1000
    for mine, whole in zip(found, free, strict=True):
        assert mine[-1].finish_reason == ("length" if seconds == 1000 else "timeout")
        assert ids(mine) == ids(whole)[:len(ids(mine))]
    if seconds == 1000:
        assert [ids(mine) for mine in found] == [ids(whole) for whole in free]
