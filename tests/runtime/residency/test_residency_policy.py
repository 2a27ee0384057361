"""The residency policy: who stays, when it changes, and the interval solver."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmoe_export.runtime.residency.policy import Costs, Residency, interval_costs, solve_interval

SHARE = st.floats(0, 1)
COST = st.floats(0, 10)


def _formula(tau, d, m0, costs):
    """The spec's sum, divided by T and B, written out."""
    f = m0 + sum(1 - (1 - d) ** j for j in range(tau)) / tau
    return costs.refresh / tau + costs.bring / tau * (1 - (1 - d) ** tau) + costs.miss * f


@given(SHARE, SHARE, COST, COST, COST, st.integers(1, 80))
def test_solver_equals_brute_force(d, m0, bring, miss, refresh, horizon):
    costs = Costs(bring, miss, refresh)
    every = [_formula(tau, d, m0, costs) for tau in range(1, horizon + 1)]
    np.testing.assert_allclose(interval_costs(d, m0, costs, horizon), every, rtol=1e-9, atol=1e-12)
    tau = solve_interval(d, m0, costs, horizon)
    assert 1 <= tau <= horizon
    assert every[tau - 1] <= min(every) * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("d, costs, tau", [
    (0.0, Costs(1, 1), 64),  # nothing changes: never refresh
    (0.1, Costs(0, 1), 1),  # moving is free
    (0.1, Costs(1, 0), 64),  # missing is free
    (0.1, Costs(11, 1), 64),  # a copy does not pay: d·C_io > C_slow
    (0.1, Costs(9, 1), 1),  # and here it always does
])
def test_solver_at_its_ends(d, costs, tau):
    assert solve_interval(d, 0.0, costs) == tau


def test_a_cost_of_refreshing_gives_an_interval_between():
    costs = Costs(0.5, 1.0, refresh=0.5)
    tau = solve_interval(0.05, 0.0, costs)
    assert 1 < tau < 64
    assert solve_interval(0.05, 0.0, Costs(0.5, 1.0, refresh=5)) > tau


@given(st.floats(0.01, 0.99), COST, COST)
def test_without_it_the_spec_s_model_knows_only_the_ends(d, bring, miss):
    slope = np.diff(interval_costs(d, 0.0, Costs(bring, miss)))
    sign = np.sign(miss - d * bring)
    assert (slope * sign >= -1e-9).all()


def _ids(rng, layers, experts, k=3, tokens=5):
    ids = rng.integers(0, experts, (layers, tokens, k)).astype(np.int32)
    ids[rng.random(ids.shape) < 0.2] = -1
    return ids


@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 12), st.integers(0, 14),
       st.sampled_from([1, 2, 5, "never", "auto"]), st.booleans())
def test_residents_are_the_best_hits_and_never_too_many(seed, layers, experts, slots, interval, warm):
    rng = np.random.default_rng(seed)
    policy = Residency(layers, experts, slots, interval, warm)
    for _ in range(8):
        policy.observe(_ids(rng, layers, experts), is_step=bool(rng.integers(2)), new_block=bool(rng.integers(2)))
        before, hits, refreshes = policy.resident.copy(), policy.hits.copy(), policy.refreshes
        moves = policy.refresh(Costs(1, 2) if policy.wants_costs else None)
        assert (policy.resident.sum(axis=1) <= slots).all()
        if policy.refreshes == refreshes:
            assert not moves
            continue
        table = before.copy()
        for move in moves:
            evicted = move.evict[move.evict >= 0]
            assert len(move.bring) == len(move.evict) > 0
            assert not before[move.layer, move.bring].any() and before[move.layer, evicted].all()
            assert not set(move.bring.tolist()) & set(evicted.tolist())
            table[move.layer, evicted], table[move.layer, move.bring] = False, True
        np.testing.assert_array_equal(table, policy.resident)
        for layer in range(layers):
            inside, outside = hits[layer][policy.resident[layer]], hits[layer][~policy.resident[layer]]
            if policy.slots and outside.size and outside.max() > 0:
                assert len(inside) == policy.slots and inside.min() >= outside.max()


@given(st.integers(1, 6), st.integers(1, 40))
def test_refreshes_come_every_interval(interval, steps):
    policy = Residency(1, 4, 2, interval, warm_start=False)
    rng, at = np.random.default_rng(0), []
    for step in range(steps):
        policy.observe(_ids(rng, 1, 4), is_step=True)
        before = policy.refreshes
        policy.refresh()
        if policy.refreshes > before:
            at.append(step)
    # The first forward fills the places, whatever the interval.
    assert at == [0, *range(interval, steps, interval)]


def test_prefill_and_commit_are_no_steps_and_blocks_start_warm():
    policy = Residency(1, 4, 2, 100)
    one = np.array([[[0, 1]]], np.int32)
    policy.observe(one, is_step=False)
    assert policy.refresh()  # fills
    policy.observe(one, is_step=False)
    assert not policy.refresh() and policy.refreshes == 1
    policy.observe(np.array([[[2, 3], [2, 3]]], np.int32), is_step=True, new_block=True)
    (move,) = policy.refresh()
    assert sorted(move.bring) == [2, 3] and sorted(move.evict) == [0, 1]
    policy.observe(one, is_step=True)
    assert not policy.refresh()


def test_never_fills_once():
    policy = Residency(1, 4, 1, "never")
    for expert in (2, 3, 3, 3):
        policy.observe(np.full((1, 1, 1), expert, np.int32), is_step=True, new_block=True)
        policy.refresh()
    assert policy.resident[0].tolist() == [False, False, True, False] and policy.refreshes == 1
    assert (policy.used_fast, policy.used_slow) == (0, 4)


def test_ties_keep_who_is_there_then_low_ids():
    policy = Residency(1, 4, 2, 1)
    policy.observe(np.array([[[3]]], np.int32), is_step=True)
    assert policy.refresh()[0].bring.tolist() == [3]  # nobody without a hit is brought in
    policy.observe(np.array([[[3, 2, 1]]], np.int32), is_step=True)
    assert policy.refresh()[0].bring.tolist() == [1]
    policy.hits[:] = [[5, 5, 5, 5]]
    policy.observe(np.full((1, 1, 1), -1, np.int32), is_step=True)
    assert policy.refresh() == []


def test_auto_measures_change_and_solves():
    policy = Residency(1, 8, 4, "auto", warm_start=False)
    for step in range(6):  # one of four experts changes at every step
        policy.observe(np.array([[[0, 1, 2, 3 + step % 2]]], np.int32), is_step=True, new_block=step == 0)
        if policy.wants_costs:
            policy.refresh(Costs(bring=1, miss=0))
        else:
            policy.refresh()
    assert policy.change == pytest.approx(0.25)
    assert policy.tau == 64
