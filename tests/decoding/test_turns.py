"""Whose forward is next: no row waits longer than the rule says, and rows of one kind share every forward."""

from __future__ import annotations

from random import Random

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st
from joining import Asked, take
from toy_backend import N, Toy

from dmoe_export.decoding.batch import JoiningBatch
from dmoe_export.decoding.caching import Plan
from dmoe_export.decoding.turns import LONG_PATIENCE, PATIENCE, Waiting, next_forward, shaped
from dmoe_export.runtime.salient import SalientStep

PREFILL = Plan("prefill", 0, 8, np.ones(8, bool))
RIDING = Plan("denoise", 0, 12, np.arange(12) < 8, rides="prefill")
STEP, COMMIT = Plan("denoise", 8, 12), Plan("denoise", 4, 12, np.arange(8) < 4, rides="commit")
SPARSE = Plan("denoise", 8, 12, salient=SalientStep(0.9, 8, False))
WHOLE, REFRESH = Plan("full", 0, 12), Plan("full", 0, 12, np.arange(12) < 4, clear=True)


class Life:
    """A row that asks for plan after plan."""

    def __init__(self, random, shares):
        self.random, self.shares = random, random.choice(shares)
        self.plans = random.choice([[STEP, COMMIT], [STEP, COMMIT, SPARSE], [WHOLE], [REFRESH, STEP, STEP, STEP]])
        self.ahead = [PREFILL] * random.randint(0, 6) + [RIDING] if self.plans[0] is STEP else []
        self.waited, self.begun, self.plan = 0, False, None
        self.advance()

    def advance(self):
        self.plan = self.ahead.pop(0) if self.ahead else self.random.choice(self.plans)
        self.waited = 0

    @property
    def waiting(self):
        return Waiting(self.plan, self.shares, self.waited, self.begun)


@settings(max_examples=150)
@given(st.integers(0, 2**32))
def test_a_row_waits_its_patience_and_one_forward_of_every_other_kind(seed):
    random = Random(seed)
    shares = range(random.randint(1, 3))
    rows, others = [Life(random, shares) for _ in range(random.randint(1, 8))], {}
    for _ in range(60):
        if random.random() < 0.2 and len(rows) < 10:
            rows.append(Life(random, shares))
        if random.random() < 0.15 and len(rows) > 1:
            rows.pop(random.randrange(len(rows)))
        waiting = [row.waiting for row in rows]
        chosen = next_forward(waiting)
        kind = waiting[chosen[0]].kind
        assert chosen == [i for i, row in enumerate(waiting) if row.kind == kind]  # all of it, and nothing else
        for i, row in enumerate(rows):
            if i in chosen:
                row.begun |= row.plan.decodes
                row.advance()
                others[id(row)] = set()
                continue
            row.waited += 1
            seen = others.setdefault(id(row), set())
            if row.waited > PATIENCE:
                seen.add(kind)
            gains = row.plan.clear or (row.plan.phase == "denoise" and row.plan.apart() is row.plan and not row.begun)
            assert row.waited <= (LONG_PATIENCE if gains else PATIENCE) + len(seen | {kind}), (row.waited, seen)


def test_prefills_and_steps_alternate_once_a_row_has_begun():
    """A long prompt joins while another row steps: neither waits more than one forward."""
    backend = Toy(max_tokens=N)
    batch = JoiningBatch(backend, 2)
    first = Asked([5], {"max_new_tokens": 20 * N, "eos_id": -1, "acceptance": "fixed", "steps": N})
    long = Asked([6] * 12 * N, {"max_new_tokens": N, "eos_id": -1, "acceptance": "fixed", "steps": N})
    first.join(batch)
    take(batch, [first])
    long.join(batch)
    stepped = []
    while long.handle.row.cached < 12 * N:
        take(batch, [first, long])
        stepped.append(first.handle.waited == 0)
    assert stepped == [i % 2 == 1 for i in range(23)]
    assert max(first.longest_wait, long.longest_wait) <= PATIENCE


def test_rows_that_have_not_begun_wait_for_company():
    """Four prompts of different lengths: their first steps are one forward, after the longest prefill."""
    backend = Toy(max_tokens=2 * N)
    batch = JoiningBatch(backend, 4)
    rows = [Asked([5 + i] * (2 * i + 2) * N, {"max_new_tokens": 2 * N, "eos_id": -1}) for i in range(4)]
    for asked in rows:
        asked.join(batch)
    while not any(asked.handle.row.step for asked in rows):
        take(batch, rows)
    assert all(asked.handle.row.step == 1 for asked in rows)
    assert max(asked.longest_wait for asked in rows) <= LONG_PATIENCE


@settings(max_examples=25)
@given(st.integers(0, 2**32))
def test_no_row_of_a_batch_starves(seed):
    """Under a stream of newcomers, with the batch's own counts of waiting."""
    random = Random(seed)
    batch, rows = JoiningBatch(Toy(max_tokens=2 * N), 4), []
    for step in range(120):
        while batch.free and step < 80 and random.random() < 0.6:
            rows.append(Asked([7] * random.randint(1, 9 * N), {"max_new_tokens": random.randint(1, 5 * N),
                                                              "eos_id": -1, "steps": N}))
            rows[-1].join(batch)
        take(batch, rows)
    assert rows and max(asked.longest_wait for asked in rows) <= LONG_PATIENCE + 2
    begun = [asked for asked in rows if asked.handle.row.step or asked.handle.row.block]
    assert all(asked.handle.waited <= PATIENCE + 2 for asked in begun)


def test_a_prompt_that_another_row_computes_starves_nobody():
    """Its blocks come from the store while an earlier row prefills them: that must not look like waiting."""
    batch = JoiningBatch(Toy(max_tokens=N), 3, prefix_cache=10**6)
    stepping = Asked([5], {"max_new_tokens": 30 * N, "eos_id": -1, "acceptance": "fixed", "steps": N})
    same = [Asked([6] * 20 * N, {"max_new_tokens": N, "eos_id": -1}) for _ in range(2)]
    stepping.join(batch)
    take(batch, [stepping])
    for asked in same:
        asked.join(batch)
    while batch.free == 0:
        take(batch, [stepping, *same])
    assert stepping.longest_wait <= PATIENCE + 1
    assert same[1].handle.row.statistics.prefix_tokens >= 16 * N


def steps_of(backend, rows, slots, random):
    """The requests in a batch, joined as soon as a slot is free; forwards it took."""
    batch, waiting, inside = JoiningBatch(backend, slots), list(rows), []
    while waiting or len(batch):
        while waiting and batch.free:
            waiting[0].join(batch)
            inside.append(waiting.pop(0))
        take(batch, inside)
    return len(backend.seen)


@settings(max_examples=8)
@given(st.integers(0, 2**32))
@example(0)
def test_where_a_wider_forward_is_as_fast_prefills_share_those_of_steps(seed):
    """Fewer forwards as a rule, none wider beside a step, and the same answers."""
    random = Random(seed)
    rows = [([7 + i % 3] * random.randint(1, 9 * N), {"max_new_tokens": random.randint(1, 6 * N), "eos_id": -1,
                                                     "steps": random.randint(1, N)}) for i in range(24)]
    wide, plain = Toy(step_tokens=2 * N), Toy()
    asked = [[Asked(*row) for row in rows] for _ in range(2)]
    shared, apart = (steps_of(backend, mine, 4, random) for backend, mine in zip((wide, plain), asked, strict=True))
    assert [one.tokens for one in asked[0]] == [one.tokens for one in asked[1]]
    assert [one.last.statistics.forwards_by_phase["denoise"] for one in asked[0]] == [
        one.last.statistics.forwards_by_phase["denoise"] for one in asked[1]]
    assert shared <= apart * 1.1 and (seed or shared < 0.95 * apart)  # chance may cost one, seldom
    for inputs in wide.seen:
        stepping = (inputs.logit_rows >= 0).any(axis=1) & ((inputs.position_ids >= 0).sum(axis=1) <= N)
        assert inputs.input_ids.shape[1] <= 2 * N or not stepping.any()


def test_a_prefill_beside_steps_is_cut_to_whole_blocks():
    long, short = Plan("prefill", 0, 16, np.ones(16, bool)), Plan("denoise", 8, 12)
    rides = Plan("denoise", 0, 12, np.arange(12) < 8, rides="prefill")
    assert [plan.width for plan in shaped([long, short], 4, 10)] == [8, 4]
    cut, _ = shaped([rides, short], 4, 10)
    assert (cut.phase, cut.width, cut.commit.sum(), cut.rides) == ("prefill", 8, 8, None)
    fits, _ = shaped([rides, short, short], 4, 12)[:2]
    assert fits is rides
    assert shaped([long, long], 4, 8) == [long, long]  # no step waits
    assert [plan.width for plan in shaped([long, rides], 4, 0)] == [16, 12]
