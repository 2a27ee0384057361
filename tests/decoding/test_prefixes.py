"""Blocks kept between rows, on a denoiser whose keys are hashes of all that was seen: a wrong one shows."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_backend import EOS, MASK, VOCAB, N, Toy, ToyCache, decode

from dmoe_export.decoding.batch import JoiningBatch
from dmoe_export.decoding.prefixes import PrefixStore, store_of
from dmoe_export.decoding.settings import DecodeSettings
from dmoe_export.errors import RequestError

BLOCK = N * ToyCache.token_bytes
OPTIONS = [{"max_new_tokens": 10}, {"max_new_tokens": 9, "eos_id": -1, "schedule": "reference"},
           {"max_new_tokens": 7, "cache": "none"}, {"max_new_tokens": 12, "eos_id": -1, "edit_threshold": 0.3},
           {"max_new_tokens": 18, "eos_id": -1, "edit_threshold": 0.3, "edit_blocks": 1}]


def finish(batch, prompts, options=OPTIONS[1]):
    """Answers and last statistics of rows that join together, in the order of the prompts."""
    rows = [batch.add(prompt, DecodeSettings(**options)) for prompt in prompts]
    answers, statistics = {row: [] for row in rows}, {}
    while len(batch):
        for done in batch.step():
            assert done.error is None
            answers[done.handle] += done.token_ids
            statistics[done.handle] = done.statistics
    return [answers[row] for row in rows], [statistics[row] for row in rows]


def alone(prompt, options):
    return decode(Toy(), [prompt], **options)[0][0]


@settings(max_examples=30)
@given(st.integers(0, 2**32))
def test_answers_are_those_without_a_store(seed):
    """Prompts out of few blocks, so many begin alike; rows join, are cancelled, and blocks leave a small store."""
    random = Random(seed)
    blocks = [[random.randrange(VOCAB) for _ in range(N)] for _ in range(random.randint(1, 3))]
    limit, width = random.randint(1, 14), random.choice([None, N, 3 * N])
    choices = [options for options in OPTIONS  # no cache: a whole canvas; open blocks: two at once
               if width is None or ("cache" not in options and ("edit_blocks" not in options or width > N))]
    batch = JoiningBatch(Toy(max_tokens=width), random.randint(1, 3),
                         prefix_cache=limit * BLOCK)
    waiting, rows, answers, cancelled = random.randint(1, 8), {}, {}, set()
    while waiting or len(batch):
        if waiting and batch.free and random.random() < 0.4:
            prompt = [token for one in random.choices(blocks, k=random.randint(0, 5)) for token in one]
            prompt += random.choices(range(3, VOCAB), k=random.randint(1, N + 1))
            options, waiting = random.choice(choices), waiting - 1
            row = batch.add(prompt, DecodeSettings(**options))
            rows[row], answers[row] = (prompt, options), []
        elif rows and random.random() < 0.1:
            cancelled.add(random.choice(list(rows)))
            batch.cancel(max(cancelled, key=lambda row: row.serial))
        for done in batch.step():
            assert done.error is None
            answers[done.handle] += done.token_ids
        state = batch.prefixes.statistics()
        assert state.bytes <= limit * BLOCK and kept_parents(batch.prefixes) == state.blocks
    for row, (prompt, options) in rows.items():
        wanted = alone(prompt, options)
        if row in cancelled:  # its blocks that were still open might have been edited
            answers[row] = answers[row][:max(0, len(answers[row]) - options.get("edit_blocks", 0) * N)]
        assert answers[row] == (wanted[:len(answers[row])] if row in cancelled else wanted)


def kept_parents(store):
    """Blocks that can be reached from the root; each must hold its numbers."""
    found, nodes = 0, [store.root]
    while nodes:
        node = nodes.pop()
        assert node.kept and (node is store.root or node.block is not None)
        nodes += node.children.values()
        found += len(node.children)
    return found


def test_whole_blocks_of_the_prompt_are_taken_but_not_the_one_in_which_the_answer_begins():
    backend = Toy()
    batch, prompt = JoiningBatch(backend, 2, prefix_cache=100 * BLOCK), list(range(3, 3 + 3 * N))
    _, (first,) = finish(batch, [[*prompt, 5, 6]])
    assert first.prefix_tokens == 0 and first.forwards_by_phase["prefill"] == 1
    for tail in ([], [5, 6], [7]):
        backend.seen.clear()
        (answer,), (later,) = finish(batch, [prompt + tail])
        assert answer == alone(prompt + tail, OPTIONS[1])
        assert later.prefix_tokens == 3 * N and later.forwards_by_phase["prefill"] == 0
        assert backend.seen[0].position_ids[0, 0] == 3 * N
    state = batch.prefixes.statistics()
    assert (state.hit_blocks, state.missed_blocks, state.evicted_blocks) == (9, 3, 0)


def test_the_next_prompt_of_a_conversation_takes_the_answer_too():
    batch, prompt = JoiningBatch(Toy(), 1, prefix_cache=100 * BLOCK), [5, 6, 7, 8, 9]
    (answer,), _ = finish(batch, [prompt], {"max_new_tokens": 3 * N, "eos_id": -1})
    following = prompt + answer + [3]
    (second,), (statistics,) = finish(batch, [following])
    # Of 17 tokens the last block, in which the answer ended, was never committed.
    assert statistics.prefix_tokens == 4 * N
    assert second == alone(following, OPTIONS[1])


def test_a_mask_id_in_a_prompt_is_text():
    batch = JoiningBatch(Toy(), 1, prefix_cache=100 * BLOCK)
    for prompt in ([MASK] * N + [4], [MASK] * N + [5], [EOS] * N + [5]):
        assert finish(batch, [prompt])[0] == [alone(prompt, OPTIONS[1])]
    assert batch.prefixes.statistics().hit_blocks == 1


def test_rows_in_prefill_take_what_others_computed_meanwhile():
    """Two rows of one long prompt, the second a chunk behind."""
    batch, prompt = JoiningBatch(Toy(max_tokens=N), 2, prefix_cache=100 * BLOCK), [4] * (6 * N) + [5]
    first = batch.add(prompt, DecodeSettings(max_new_tokens=2))
    batch.step()
    batch.step()
    second = batch.add(prompt, DecodeSettings(max_new_tokens=2))
    while len(batch):
        batch.step()
    assert first.row.statistics.prefix_tokens == 0 and second.row.statistics.prefix_tokens >= 2 * N
    assert first.row.canvas.tolist() == second.row.canvas.tolist()


def test_rows_that_join_together_compute_a_long_common_beginning_once():
    """The others wait a forward for it; a beginning of few blocks is not worth that."""
    for blocks, first in ((6, 1), (3, 3)):
        backend = Toy()
        batch, prompt = JoiningBatch(backend, 3, prefix_cache=100 * BLOCK), [4] * (blocks * N)
        tails = [[5], [6, 7], [8, 9, 3, 3, 5]]
        got, statistics = finish(batch, [prompt + tail for tail in tails])
        assert got == [alone(prompt + tail, OPTIONS[1]) for tail in tails]
        assert len(backend.seen[0].input_ids) == first
        computed = sum((one.position_ids < blocks * N).sum() - (one.position_ids < 0).sum() for one in backend.seen)
        assert computed == first * blocks * N
        assert [one.prefix_tokens for one in statistics] == [0] + [blocks * N * (first == 1)] * 2


def test_rows_wait_for_no_one_where_nothing_is_kept():
    """The store is full of the first row's own: the others compute, one after the other."""
    batch, prompt = JoiningBatch(Toy(), 3, prefix_cache=BLOCK), [4] * (6 * N)
    got, _ = finish(batch, [[*prompt, tail] for tail in (5, 6, 7)])
    assert got == [alone([*prompt, tail], OPTIONS[1]) for tail in (5, 6, 7)]


def store(blocks):
    return PrefixStore(blocks * 10, 1, 10)


def chain(store, tokens, routing=()):
    node = store.root
    for token in tokens:
        node = store.keep(node, routing, np.array([token]), lambda token=token: f"block {token}", True)
        if node is None:
            return None
    return node


def longest(store, tokens, routing=()):
    return [node.block for node in store.longest(store.root, routing, np.array(tokens))]


def test_the_least_recently_used_leaves_go_first():
    kept = store(4)
    chain(kept, [1, 2])
    chain(kept, [3, 4])
    assert longest(kept, [1, 2]) == ["block 1", "block 2"]
    chain(kept, [1, 5])  # the place of 4, though 3 is as old
    assert longest(kept, [3, 4]) == ["block 3"]
    chain(kept, [6])  # 2 is older than 3 now
    assert longest(kept, [1, 2]) == ["block 1"] and longest(kept, [3]) == ["block 3"] and longest(kept, [1, 5, 6])
    assert kept.statistics().evicted_blocks == 2 and kept.statistics().bytes == 40


def test_a_chain_longer_than_the_store_keeps_its_beginning():
    kept = store(3)
    chain(kept, [9, 8])
    assert chain(kept, [1, 2, 3, 4, 5]) is None
    assert longest(kept, [1, 2, 3, 4]) == ["block 1", "block 2", "block 3"] and kept.statistics().blocks == 3


def test_a_row_whose_blocks_have_left_leaves_no_orphans():
    kept = store(2)
    node = chain(kept, [1, 2])
    chain(kept, [3, 4])
    assert kept.keep(node, (), np.array([5]), pytest.fail, False) is None and longest(kept, [1, 2]) == []


def test_other_routing_settings_are_other_blocks():
    kept = store(9)
    chain(kept, [1, 2], (("top_p", 0.5),))
    assert longest(kept, [1, 2], (("top_p", 0.6),)) == [] and len(longest(kept, [1, 2, 3], (("top_p", 0.5),))) == 2


def test_what_is_there_is_not_read_again():
    kept = store(9)
    chain(kept, [1])
    assert kept.keep(kept.root, (), np.array([1]), pytest.fail, False).block == "block 1"


@pytest.mark.parametrize(("backend", "size", "words"), [
    (Toy("full"), "1G", "attends to the whole canvas; leave prefix_cache out"),
    (Toy(shift=True), "1G", "is not offered for family toy; leave prefix_cache out"),
    (Toy(), BLOCK - 1, "The prefix cache of 39 bytes must be between the 40 of one block"),
    (Toy(), "9000T", "machine's memory of"), (Toy(), "-1G", "Prefix cache '-1G' is not positive"),
    (Toy(), "much", "Prefix cache 'much' is no size")])
def test_refusals(backend, size, words):
    with pytest.raises(RequestError, match=words):
        store_of(backend, backend.new_cache(1), size)


def test_a_row_that_cannot_take_its_blocks_ends_alone(monkeypatch):
    batch, prompt = JoiningBatch(Toy(), 2, prefix_cache=100 * BLOCK), [4] * N + [5]
    finish(batch, [prompt])
    good = batch.add([7] * N + [3], DecodeSettings(**OPTIONS[1]))
    batch.step()
    bad = batch.add(prompt, DecodeSettings(**OPTIONS[1]))
    monkeypatch.setattr(ToyCache, "write", lambda *_: (_ for _ in ()).throw(MemoryError("no memory")))
    done = []
    while len(batch):
        done += batch.step()
    assert [(one.handle is bad, str(one.error)) for one in done if one.error] == [(True, "no memory")]
    assert [one.finish_reason for one in done if one.handle is good][-1] == "length"
