"""The eager sparse step against the specification written out, and against full forwards."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from salient_helpers import MASK, by_hand, fill, make_model, positions, random_ids

from dmoe_export.model.denoiser import Past
from dmoe_export.model.salient import RangeState, SalientDenoiser

KINDS = ["dense", "moe", "block"]
MODELS = {kind: make_model(kind) for kind in KINDS}


@torch.no_grad()
def step(model, ids, at, past, old, unmasked, tau, capacity="any"):
    return SalientDenoiser(model, capacity)(ids, at, past, old, torch.as_tensor(unmasked), torch.tensor([tau]))


def close(ours: RangeState, other: RangeState, atol: float = 1e-5) -> None:
    for mine, theirs in zip(ours, other, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=atol)


def prompt_cache(model, ids) -> Past:
    with torch.no_grad():
        out = model(ids, positions(*ids.shape))
    return Past(out.keys, out.values, positions(*ids.shape))


@pytest.mark.parametrize("kind", KINDS)
def test_dense_step_is_a_forward(kind):
    model = MODELS[kind]
    ids, at = random_ids(1, 2, 19), positions(2, 19).clone()
    at[1, 12:] = -1
    with torch.no_grad():
        want = model(ids, at)
    logits, state = fill(model, ids, at, model.empty_past(2))
    torch.testing.assert_close(logits[at >= 0], want.logits[at >= 0])
    for key, expected in zip(state.keys, want.keys, strict=True):
        torch.testing.assert_close(key, expected)
    all_rows = step(model, ids, at, model.empty_past(2), state, np.ones((2, 19), bool), 2.0)
    torch.testing.assert_close(all_rows.logits[at >= 0], want.logits[at >= 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tau", [0.9, 0.99, 2.0])
def test_sparse_step_is_the_specification(kind, tau):
    """Two steps with rows outside the range, so that cached C moves and the second starts from the first's state."""
    model = MODELS[kind]
    past = prompt_cache(model, random_ids(2, 1, 8))
    ids, at = torch.full((1, 16 if kind != "block" else 8), MASK), None
    at = positions(1, ids.shape[1], 8)
    _, state = fill(model, ids, at, past)
    hand = state
    seen = 0
    for changed in ([1, 5], [0, 2, 6]):
        ids = ids.clone()
        ids[0, changed] = torch.tensor([7, 11, 13][:len(changed)])
        unmasked = np.isin(np.arange(ids.shape[1]), changed)
        out = step(model, ids, at, past, state, unmasked[None], tau)
        logits, salient, hand = by_hand(model, ids[0], at[0], past, hand, unmasked, tau)
        np.testing.assert_array_equal(torch.stack(out.salient)[:, 0].numpy(), salient)
        np.testing.assert_allclose(out.logits[0].numpy(), logits, rtol=1e-4, atol=1e-5)
        close(out.state, hand)
        seen += salient.sum()
        for ids_of_layer, layer in zip(out.expert_ids, model.description.moe_layers, strict=True):
            np.testing.assert_array_equal((ids_of_layer[0] >= 0).any(-1).numpy(), salient[layer])
        state = out.state
    assert seen > 0 or tau == 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_exact_oracle_and_why_it_needs_layer_0(kind):
    """Exact layer 0, τ > 1, whole sequence: a full recompute at every step. Without the first, rows drift."""
    model, tokens = MODELS[kind], 24
    at, past = positions(1, tokens), model.empty_past(1)
    ids = random_ids(3, 1, tokens)
    ids[0, 8:] = MASK
    _, exact = fill(model, ids, at, past)
    loose = exact
    for number in range(4):
        ids = ids.clone()
        changed = [8 + 2 * number, 23 - number]
        ids[0, changed] = torch.tensor([number + 1, number + 20])
        with torch.no_grad():
            want = model(ids, at).logits
        out = step(model, ids, at, past, exact, np.ones((1, tokens), bool), 1.5)
        torch.testing.assert_close(out.logits, want, rtol=0, atol=1e-4)
        exact = out.state
        drifting = step(model, ids, at, past, loose, np.isin(np.arange(tokens), changed)[None], 1.5)
        loose = drifting.state
        assert all(x.all() for x in drifting.salient)  # every row is recomputed, but from an approximate context
    assert (drifting.logits - want).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("capacity", ["any", 4])
def test_nothing_is_salient(kind, capacity):
    model = MODELS[kind]
    ids, at, past = random_ids(4, 1, 12), positions(1, 12), model.empty_past(1)
    logits, state = fill(model, ids, at, past)
    out = step(model, ids, at, past, state, np.zeros((1, 12), bool), 0.5, capacity)
    assert not any(x.any() for x in out.salient)
    assert all((x == -1).all() for x in out.expert_ids)
    torch.testing.assert_close(out.logits, logits, rtol=1e-5, atol=1e-5)
    close(out.state, state)


def test_padding_is_never_recomputed():
    model = MODELS["block"]
    ids, at = random_ids(5, 1, 8), positions(1, 8).clone()
    at[0, 5:] = -1
    _, state = fill(model, ids, at, model.empty_past(1))
    out = step(model, ids, at, model.empty_past(1), state, np.ones((1, 8), bool), 2.0)
    assert all(x[0].tolist() == [True] * 5 + [False] * 3 for x in out.salient)
    assert all((x[0, 5:] == -1).all() for x in out.expert_ids)


def test_beyond_the_capacity_the_lowest_cosines_are_kept_and_all_are_reported():
    model = MODELS["dense"]
    ids, at, past = random_ids(6, 1, 16), positions(1, 16), model.empty_past(1)
    _, state = fill(model, ids, at, past)
    changed = ids.clone()
    changed[0, 3] = (changed[0, 3] + 1) % 50
    only = np.arange(16)[None] == 3
    free = step(model, changed, at, past, state, only, 2.0)
    tight = step(model, changed, at, past, state, only, 2.0, capacity=5)
    assert free.salient[0].sum() == tight.salient[0].sum() == 16
    moved = (tight.state.ffns[0] - state.ffns[0]).abs().sum(-1)[0] > 0
    cosine = torch.cosine_similarity(tight.state.contexts[0], state.contexts[0], dim=-1)[0]
    assert set(moved.nonzero().flatten().tolist()) == set(cosine.argsort()[:5].tolist())


@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 2**16), data=st.data())
def test_rows_of_a_batch_are_independent_and_capacities_agree(kind, seed, data):
    """Random salient masks of two sequences of different lengths: batch = single rows, fixed capacity = dynamic."""
    model, tokens = MODELS[kind], 8
    lengths = [8, data.draw(st.integers(1, 8))]
    ids, at = random_ids(seed, 2, tokens), positions(2, tokens).clone()
    at[1, lengths[1]:] = -1
    _, state = fill(model, ids, at, model.empty_past(2))
    unmasked = np.array(data.draw(st.lists(st.lists(st.booleans(), min_size=8, max_size=8), min_size=2, max_size=2)))
    new = torch.where(torch.from_numpy(unmasked), random_ids(seed + 1, 2, tokens), ids)
    tau = data.draw(st.sampled_from([0.3, 0.9, 0.99, 2.0]))
    both = step(model, new, at, model.empty_past(2), state, unmasked, tau)
    fixed = step(model, new, at, model.empty_past(2), state, unmasked, tau, capacity=8)
    real = at >= 0
    torch.testing.assert_close(fixed.logits[real], both.logits[real], rtol=1e-4, atol=1e-5)
    close(fixed.state, both.state, 1e-4)
    for row, length in enumerate(lengths):
        own = RangeState(*([x[row:row + 1] for x in part] for part in state))
        own = RangeState([x[:, :, :length] for x in own.keys], [x[:, :, :length] for x in own.values],
                         [x[:, :length] for x in own.contexts], [x[:, :length] for x in own.ffns])
        alone = step(model, new[row:row + 1, :length], at[row:row + 1, :length], model.empty_past(1), own,
                     unmasked[row:row + 1, :length], tau)
        torch.testing.assert_close(both.logits[row, :length], alone.logits[0], rtol=1e-4, atol=1e-5)
        for a, b in zip(both.expert_ids, alone.expert_ids, strict=True):
            assert (a[row, :length] == b[0]).all()
