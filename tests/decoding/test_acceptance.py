"""Acceptance policies and sampling: rules, ties, progress."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmoe_export.decoding.acceptance import credit, edits, factor, fixed, hierarchy, policy, scheduled, threshold
from dmoe_export.decoding.sampling import greedy, sample, without
from dmoe_export.decoding.settings import ACCEPTANCES, DecodeSettings
from dmoe_export.errors import RequestError

CONFIDENCES = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=32).map(lambda x: np.array(x, np.float32))


def _chosen(accepted):
    return np.flatnonzero(accepted).tolist()


def test_schedule_spreads_the_rest_over_the_first_steps():
    assert [scheduled(32, 32, step) for step in range(32)] == [1] * 32
    assert [scheduled(32, 5, step) for step in range(5)] == [7, 7, 6, 6, 6]
    assert sum(scheduled(32, 40, step) for step in range(40)) == 32
    assert (scheduled(32, 2**31, 0), scheduled(32, 2**31, 2**31 - 1)) == (1, 0)  # nothing is listed


def test_threshold_is_strict_and_falls_back_to_the_schedule():
    confidence = np.float32([0.5, 0.95, 0.96, 0.99])
    limit = float(np.float32(0.95))
    assert _chosen(threshold(confidence, 1, limit)) == [2, 3]
    assert _chosen(threshold(confidence, 3, limit)) == [1, 2, 3]
    assert _chosen(threshold(np.float32([0.2, 0.2, 0.1]), 1, 0.9)) == [0]  # tie: lower position


def test_fixed_takes_exactly_the_schedule():
    assert _chosen(fixed(np.float32([0.9, 0.1, 0.9, 0.8]), 2)) == [0, 2]
    assert _chosen(fixed(np.float32([0.9]), 5)) == [0]
    assert _chosen(fixed(np.float32([0.1, 0.2]), 0)) == [1]  # always progress


def test_factor_takes_the_longest_passing_prefix():
    # f = 1: rank 2 needs 1 − 1/3, rank 3 needs 0.75, rank 4 needs 0.8
    assert _chosen(factor(np.float32([0.7, 0.1, 0.9, 0.8]), 1, 1.0)) == [2, 3]
    assert _chosen(factor(np.float32([0.9, 0.85, 0.8, 0.81]), 1, 1.0)) == [0, 1, 2, 3]
    assert _chosen(factor(np.float32([0.1, 0.2]), 1, 0.0)) == [1]
    # a later rank that passes does not count once one has failed
    assert _chosen(factor(np.float32([0.5, 0.5, 0.5]), 1, 1.2)) == [0]


def test_hierarchy_takes_the_best_of_every_run():
    places = np.array([0, 1, 2, 5, 6, 9])
    confidence = np.float32([0.5, 0.6, 0.5, 0.3, 0.2, 0.45])
    assert _chosen(hierarchy(confidence, places, 0.4, 0.9)) == [1, 5]  # the run 5–6 has nothing above 0.4
    assert _chosen(hierarchy(confidence, places, 0.1, 0.9)) == [1, 3, 5]
    assert _chosen(hierarchy(confidence, places, 0.4, 0.48)) == [0, 1, 2, 5]  # all above the threshold too
    assert _chosen(hierarchy(confidence, places, 0.9, 0.9)) == [1]  # always the best
    assert _chosen(hierarchy(np.float32([0.7, 0.7, 0.7]), np.array([0, 2, 3]), 0.4, 0.9)) == [0, 1]  # ties: lower
    assert _chosen(hierarchy(np.float32([0.5, 0.6]), np.array([3, 4]), 0.5, 0.6)) == [1]  # limits are strict


@given(CONFIDENCES, st.data(), st.floats(0, 1), st.floats(0, 1))
def test_hierarchy_is_its_definition(confidence, data, low, limit):
    places = np.sort(data.draw(st.permutations(range(40)))[:len(confidence)])
    accepted = hierarchy(confidence, places, low, limit)
    for i in range(len(places)):  # places − their rank is the same all along a run
        run = np.flatnonzero(places - np.arange(len(places)) == places[i] - i).tolist()
        best = min(run, key=lambda j: (-confidence[j], j)) == i and confidence[i] > low
        overall = i == int(np.argmax(confidence))
        assert accepted[i] == (best or overall or confidence[i] > limit)


def test_credit_raises_what_was_best_before():
    """The numbers of dInfer's rule by hand: α 0.7, β 0.8, γ 0.2."""
    logits = np.log(np.array([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3]]))
    raised, held = credit(logits, np.array([3, 7]), {}, 0.7, 0.8, 0.2)
    assert held == {3: {0: pytest.approx(0.6**0.2)}, 7: {1: pytest.approx(0.5**0.2)}}
    np.testing.assert_allclose(raised - logits,
                               [[0.7 * np.log(1 + 0.6**0.2), 0, 0], [0, 0.7 * np.log(1 + 0.5**0.2), 0]])
    # the next step: place 7 is decoded, place 3 changes its mind, the old credit decays
    raised, held = credit(logits[1:], np.array([3]), held, 0.7, 0.8, 0.2)
    assert held == {3: {0: pytest.approx(0.8 * 0.6**0.2), 1: pytest.approx(0.5**0.2)}}
    np.testing.assert_allclose(raised - logits[1:],
                               [[0.7 * np.log(1 + 0.8 * 0.6**0.2), 0.7 * np.log(1 + 0.5**0.2), 0]])


def test_credit_makes_a_repeated_choice_more_certain():
    logits, held, confidences = np.log(np.array([[0.5, 0.3, 0.2, 0.0001]])), {}, []
    for _ in range(6):
        raised, held = credit(without(logits, 3), np.array([0]), held, 0.7, 0.8, 0.2)
        token, confidence = greedy(raised)
        assert token.tolist() == [0]
        confidences.append(float(confidence[0]))
    assert confidences == sorted(confidences) and confidences[0] > 0.5 and confidences[-1] > confidences[0] + 0.1
    assert (credit(logits, np.array([0]), held, 0.0, 0.8, 0.2)[0] == logits).all()  # α 0 is off


def test_credit_never_revives_the_mask():
    raised, held = credit(without(np.float32([[1, 9, 2]]), 1), np.array([0]), {}, 0.7, 0.8, 0.2)
    assert list(held[0]) == [2] and raised[0, 1] == -np.inf and np.isfinite(raised[0, [0, 2]]).all()


def test_edits_need_another_token_that_is_sure():
    best, confidence = np.array([5, 5, 5, 5]), np.float32([0.9, 0.5, 0.51, 0.1])
    assert edits(best, confidence, np.array([5, 4, 4, 4]), 0.5).tolist() == [False, False, True, False]
    assert edits(best, confidence, np.array([4, 4, 4, 4]), 0.0).all()


@given(CONFIDENCES, st.integers(0, 32), st.sampled_from(ACCEPTANCES), st.floats(0, 1), st.data())
def test_every_policy_makes_progress_and_prefers_confidence(confidence, scheduled, name, value, data):
    places = np.sort(data.draw(st.permutations(range(40)))[:len(confidence)])
    accepted = policy(DecodeSettings(acceptance=name, threshold=value, factor=value))(confidence, places, scheduled)
    assert accepted.any() and accepted.shape == confidence.shape
    assert accepted[np.argmax(confidence)]
    if not accepted.all() and name != "hierarchy":
        assert confidence[accepted].min() >= confidence[~accepted].max()


def test_greedy_ties_go_to_the_lower_id():
    tokens, confidence = greedy(without(np.float32([[9, 1, 3, 3]]), 0))
    assert tokens.tolist() == [2]
    np.testing.assert_allclose(confidence, 1 / (2 + np.exp(-2)), rtol=1e-6)


def test_sampling_follows_the_distribution_and_never_gives_the_mask():
    logits = np.log(np.float32([[0.5, 0.3, 0.15, 0.05]])).repeat(4000, 0)
    tokens, confidence = sample(without(logits, 3), DecodeSettings(temperature=1.0), np.random.default_rng(0))
    share = np.bincount(tokens, minlength=4) / 4000
    np.testing.assert_allclose(share[:3], np.array([0.5, 0.3, 0.15]) / 0.95, atol=0.03)
    assert share[3] == 0
    np.testing.assert_allclose(confidence, (np.array([0.5, 0.3, 0.15]) / 0.95)[tokens], atol=1e-5)


@pytest.mark.parametrize(("options", "allowed"), [({"top_k": 1}, {0}), ({"top_k": 2}, {0, 1}), ({"top_p": 0.5}, {0}),
                                                  ({"top_p": 0.6}, {0, 1}), ({"top_p": 1.0}, {0, 1, 2})])
def test_filters(options, allowed):
    logits = np.log(np.float32([[0.55, 0.3, 0.15, 0.9]])).repeat(500, 0)
    settings = DecodeSettings(temperature=1.0, **options)
    tokens, confidence = sample(without(logits, 3), settings, np.random.default_rng(1))
    assert set(tokens.tolist()) == allowed
    # filters do not inflate confidence
    np.testing.assert_allclose(confidence, np.array([0.55, 0.3, 0.15])[tokens], atol=1e-5)


@pytest.mark.parametrize("options", [
    {"max_new_tokens": 0}, {"steps": 0}, {"threshold": 1.5}, {"temperature": -1}, {"top_p": 0}, {"top_k": -1},
    {"seed": -1}, {"eos_id": -2}, {"acceptance": "guess"}, {"temperature": float("nan")}, {"cache": "big"},
    {"block_length": 0}, {"low_threshold": -0.1}, {"credit_alpha": -1}, {"credit_beta": 1.1},
    {"credit_gamma": float("inf")}, {"edit_threshold": 2}, {"edit_passes": -1}])
def test_meaningless_settings_are_refused(options):
    with pytest.raises(RequestError, match=next(iter(options))):
        DecodeSettings(**options)
