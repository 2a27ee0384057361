"""Rows that join and leave at any step: answers do not change, no slot is lost, faults end one row alone.

On a denoiser of hashes, which notices every key that should not be seen (tests/helpers/toy_backend.py).
"""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from joining import Asked, alone, check, live, take
from toy_backend import EOS, VOCAB, N, Toy, ToyCache

from dmoe_export.decoding.batch import JoiningBatch
from dmoe_export.decoding.settings import ACCEPTANCES, DecodeSettings
from dmoe_export.errors import NotFiniteError, RequestError

POISON = 23  # a prompt that begins with this token has the fault


def options(random, attention):
    caches = ["auto", "none", "block"] if attention == "block_causal" else ["auto", "none", "prefix", "dual"]
    chosen = {"max_new_tokens": random.randint(1, 4 * N), "cache": random.choice(caches),
              "steps": random.randint(1, 2 * N), "acceptance": random.choice(ACCEPTANCES),
              "threshold": random.choice([0.3, 0.6, 0.95]), "schedule": random.choice(["merged", "reference"]),
              "seed": random.randint(0, 9), "early_stop": random.random() < 0.5,
              "eos_id": random.choice([None, -1, [EOS, 5, 6]])}
    if random.random() < 0.4:
        chosen |= {"temperature": random.choice([0.5, 1.5]), "top_k": random.choice([0, 3]),
                   "top_p": random.choice([1.0, 0.8])}
    if random.random() < 0.3:
        chosen |= {"edit_threshold": random.choice([0.2, 0.5]), "edit_passes": random.randint(0, 3)}
        if attention == "block_causal":
            chosen["edit_blocks"] = random.choice([0, 0, 1, 3])
    if attention == "full" and random.random() < 0.5:
        chosen["block_length"] = random.choice([1, 3, N, 6])
    return chosen


def requests(random, attention, most=10):
    rows = []
    for _ in range(random.randint(1, most)):
        prompt = random.choices(range(3, POISON), k=random.randint(1, 4 * N))
        rows.append(Asked(prompt, options(random, attention), random.randint(0, 3),
                          random.choice([None, None, random.randrange(VOCAB)])))
    return rows


@settings(max_examples=50)
@given(st.integers(0, 2**32), st.sampled_from([("block_causal", False), ("full", False), ("full", True)]))
def test_an_answer_is_that_of_the_request_alone(seed, kind):
    random, backend = Random(seed), Toy(*kind)
    batch, rows = JoiningBatch(backend, random.randint(1, 4)), requests(random, kind[0])
    live(batch, rows, random, random.choice([0, 0.1, 0.3]),
         lambda: [pytest.fail("a free row holds tokens") for row in batch._cache.rows[len(batch):] if row])
    check(rows, Toy(*kind))


@settings(max_examples=30)
@given(st.integers(0, 2**32))
def test_narrow_forwards_of_an_engine(seed):
    """Prefills come in chunks or are cut beside steps, and not all that could ride fits."""
    random, width = Random(seed), N * Random(seed).randint(1, 3)
    fast = random.choice([None, N, 2 * N + 1])
    backend = Toy(max_tokens=width, step_tokens=fast)
    rows = [Asked(asked.prompt, {**asked.options, "cache": "block", "edit_blocks": 0}, asked.index) for asked in
            requests(random, "block_causal")]
    live(JoiningBatch(backend, random.randint(1, 4)), rows, random)
    check(rows, Toy(max_tokens=width), prefills=fast is None)
    assert all(inputs.input_ids.shape[1] <= width for inputs in backend.seen)  # cancelled first: none


def test_first_done_first_out_and_the_next_takes_its_place():
    batch = JoiningBatch(Toy(), 2)
    slow, fast = (Asked([5] * N, {"max_new_tokens": n, "eos_id": -1, "steps": 4}) for n in (8 * N, N))
    third = Asked([6], {"max_new_tokens": N, "eos_id": -1, "steps": 1})
    slow.join(batch)
    fast.join(batch)
    with pytest.raises(RequestError, match=r"All 2 slots of the batch are taken; wait until a row has left\."):
        third.join(batch)
    while fast.last is None:
        take(batch, [slow, fast])
    third.join(batch)
    while third.last is None or third.last.finish_reason is None:
        take(batch, [slow, fast, third])
    assert slow.last is None or slow.last.finish_reason is None
    assert len(batch) == 1 and batch.free == 1
    while len(batch):
        take(batch, [slow])
    check([slow, fast, third], Toy())


class Faulty(Toy):
    """Fails where a row begins with POISON: `at` says in what, `times` how often."""

    def __init__(self, at, times=10**9):
        super().__init__()
        self.at, self.times = at, times

    def new_cache(self, rows):
        return FaultyCache(self, rows)

    def forward(self, inputs, cache):
        poisoned = _begins(inputs) | np.array([row.get(0, (0, 0))[0] == POISON for row in cache.rows])
        if self.at == "forward" and poisoned.any() and self.times > 0:
            self.times -= 1
            raise RuntimeError("no memory")
        outputs = super().forward(inputs, cache)
        if self.at == "numbers":
            outputs.confidence[poisoned] = np.nan
            if outputs.logits is not None:
                outputs.logits[poisoned] = np.nan
        return outputs


def _begins(inputs):
    return (inputs.input_ids[:, 0] == POISON) & (inputs.position_ids[:, 0] == 0)


class FaultyCache(ToyCache):
    def __init__(self, backend, rows):
        super().__init__(rows)
        self.backend = backend

    def part(self, rows):
        if self.backend.at == "part" and any(self.rows[row].get(0, (0, 0))[0] == POISON for row in rows):
            raise MemoryError("no room")
        return super().part(rows)

    def commit(self, inputs, outputs, take, rows=None):
        if self.backend.at == "commit" and (_begins(inputs) & take[:, 0]).any():
            raise RuntimeError("the cache is full")
        super().commit(inputs, outputs, take, rows)


@settings(max_examples=30)
@given(st.integers(0, 2**32), st.sampled_from(["forward", "numbers", "part"]))
def test_a_fault_ends_the_row_that_has_it(seed, at):
    random = Random(seed)
    rows = requests(random, "block_causal", 6)
    bad = [asked for asked in rows if random.random() < 0.3]
    for asked in bad:
        asked.prompt[:] = [POISON] * N + asked.prompt
    batch = JoiningBatch(Faulty(at), random.randint(1, 4))
    live(batch, rows, random)
    check([asked for asked in rows if asked not in bad], Toy())
    assert batch.free == batch.slots and not any(batch._cache.rows)
    kinds = {"forward": RuntimeError, "numbers": NotFiniteError, "part": MemoryError}
    for asked in bad:
        if at == "part" and asked.last.error is None:  # an answer of one forward never reads its cache
            assert asked.last.statistics.executed_forwards <= 2 or asked.options["cache"] == "none" or asked.left
        elif not asked.left:
            assert isinstance(asked.last.error, kinds[at]) and asked.last.token_ids == []


def test_numbers_that_are_not_finite_end_their_row_with_a_sentence():
    batch = JoiningBatch(Faulty("numbers"), 3)
    rows = [Asked([5, 6], {"max_new_tokens": 3 * N}), Asked([POISON], {"max_new_tokens": 3 * N}, index=7),
            Asked([9] * 6, {"max_new_tokens": 3 * N, "temperature": 1.0})]
    live(batch, rows, Random(0), cancelling=0)
    check(rows[::2], Toy())
    assert isinstance(rows[1].last.error, NotFiniteError) and "Prompt 7 gets no answer" in str(rows[1].last.error)


def test_a_forward_that_failed_once_is_made_up():
    backend = Faulty("forward", times=1)
    rows = [Asked([5, 6], {"max_new_tokens": 3 * N}), Asked([POISON], {"max_new_tokens": 3 * N})]
    live(JoiningBatch(backend, 2), rows, Random(1), cancelling=0)
    check(rows, Toy())
    alone_again = Faulty("forward", times=1)
    assert isinstance(alone(alone_again, rows[1]).last.error, RuntimeError)  # by itself there is nobody to blame but it


def test_a_commit_that_fails_ends_the_rows_of_it():
    backend = Faulty("commit")
    rows = [Asked([POISON] * N, {"max_new_tokens": 2 * N}), Asked([7] * N, {"max_new_tokens": 2 * N}),
            Asked([8], {"max_new_tokens": 2 * N})]
    batch = JoiningBatch(backend, 3)
    for asked in rows:
        asked.join(batch)
    while len(batch):
        take(batch, rows)
    assert [type(asked.last.error) for asked in rows] == [RuntimeError, RuntimeError, type(None)]
    check(rows[2:], Toy())


def test_a_row_that_leaves_before_its_first_step():
    batch = JoiningBatch(Toy(), 2)
    rows = [Asked([5, 6], {"max_new_tokens": N}), Asked([7], {"max_new_tokens": N})]
    for asked in rows:
        asked.join(batch)
    batch.cancel(rows[0].handle)
    take(batch, rows)
    assert rows[0].last.finish_reason == "cancelled" and rows[0].tokens == [] and len(batch) == 1
    assert rows[0].last.statistics.executed_forwards == 0 and not batch._backend.seen
    batch.cancel(rows[0].handle)  # once more does nothing
    while len(batch):
        take(batch, rows)
    check(rows[1:], Toy())


def test_time_limits_run_from_joining(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("dmoe_export.decoding.batch.time.monotonic", lambda: now[0])
    batch = JoiningBatch(Toy(), 2)
    early = Asked([5, 6], {"max_new_tokens": 40 * N, "time_limit": 5.0, "eos_id": -1, "steps": 2})
    late = Asked([5, 6], {"max_new_tokens": 40 * N, "time_limit": 5.0, "eos_id": -1, "steps": 2})
    early.join(batch)
    while not early.tokens:
        take(batch, [early])
    now[0] += 4
    late.join(batch)
    now[0] += 2
    take(batch, [early, late])
    assert early.last.finish_reason == "timeout" and len(batch) == 1
    assert early.last.statistics.new_tokens == len(early.tokens) > 0
    now[0] += 4
    take(batch, [early, late])
    assert late.last.finish_reason == "timeout" and late.tokens == [] and len(batch) == 0


def test_text_that_cannot_be_had_ends_its_row_alone():
    def broken(tokens, last):
        raise ValueError("a tokenizer's")

    batch, well = JoiningBatch(Toy(), 2), Asked([7], {"max_new_tokens": 3 * N})
    ill = Asked([5, 6], {"max_new_tokens": 3 * N})
    ill.handle = batch.add(ill.prompt, DecodeSettings(**ill.options), ends=broken)
    well.join(batch)
    while len(batch):
        take(batch, [ill, well])
    assert isinstance(ill.last.error, ValueError) and ill.tokens == []
    check([well], Toy())


def test_who_watches_ends_a_row_alone():
    def broken(seen):
        raise ValueError("a page's")

    batch, well = JoiningBatch(Toy(), 2), Asked([7] * N, {"max_new_tokens": 3 * N})
    ill = Asked([5] * N, {"max_new_tokens": 3 * N})
    ill.handle = batch.add(ill.prompt, DecodeSettings(**ill.options), watch=broken)
    well.join(batch)
    while len(batch):
        take(batch, [ill, well])
    assert isinstance(ill.last.error, ValueError)
    check([well], Toy())


def test_many_rows_leave_nothing_behind():
    """What is held after 48 rows is what was held after 12."""
    import gc
    import tracemalloc

    random, batch, held = Random(3), JoiningBatch(Toy(), 4), []
    batch._backend.seen = _Forgetful()
    tracemalloc.start()
    try:
        for _ in range(4):
            live(batch, [Asked([random.randrange(3, POISON)] * 3, {"max_new_tokens": N}) for _ in range(12)],
                 random)
            gc.collect()
            held.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert len(batch) == 0 and held[3] - held[0] < 20_000


class _Forgetful(list):
    def append(self, value):
        pass
