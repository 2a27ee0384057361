"""Acceptance policies and sampling: rules, ties, progress."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmoe_export.decoding.acceptance import factor, fixed, policy, schedule, threshold
from dmoe_export.decoding.sampling import sample
from dmoe_export.decoding.settings import DecodeSettings
from dmoe_export.errors import RequestError

CONFIDENCES = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=32).map(lambda x: np.array(x, np.float32))


def _chosen(accepted):
    return np.flatnonzero(accepted).tolist()


def test_schedule_spreads_the_rest_over_the_first_steps():
    assert schedule(32, 32) == [1] * 32
    assert schedule(32, 5) == [7, 7, 6, 6, 6]
    assert sum(schedule(32, 40)) == 32


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


@given(CONFIDENCES, st.integers(0, 32), st.sampled_from(["threshold", "fixed", "factor"]), st.floats(0, 1))
def test_every_policy_makes_progress_and_prefers_confidence(confidence, scheduled, name, value):
    accepted = policy(DecodeSettings(acceptance=name, threshold=value, factor=value))(confidence, scheduled)
    assert accepted.any() and accepted.shape == confidence.shape
    if not accepted.all():
        assert confidence[accepted].min() >= confidence[~accepted].max()


def test_sampling_follows_the_distribution_and_never_gives_the_mask():
    logits = np.log(np.float32([[0.5, 0.3, 0.15, 0.05]])).repeat(4000, 0)
    tokens, confidence = sample(logits, 3, DecodeSettings(temperature=1.0), np.random.default_rng(0))
    share = np.bincount(tokens, minlength=4) / 4000
    np.testing.assert_allclose(share[:3], np.array([0.5, 0.3, 0.15]) / 0.95, atol=0.03)
    assert share[3] == 0
    np.testing.assert_allclose(confidence, (np.array([0.5, 0.3, 0.15]) / 0.95)[tokens], atol=1e-5)


@pytest.mark.parametrize(("options", "allowed"), [({"top_k": 1}, {0}), ({"top_k": 2}, {0, 1}), ({"top_p": 0.5}, {0}),
                                                  ({"top_p": 0.6}, {0, 1}), ({"top_p": 1.0}, {0, 1, 2})])
def test_filters(options, allowed):
    logits = np.log(np.float32([[0.55, 0.3, 0.15, 0.9]])).repeat(500, 0)
    tokens, confidence = sample(logits, 3, DecodeSettings(temperature=1.0, **options), np.random.default_rng(1))
    assert set(tokens.tolist()) == allowed
    # filters do not inflate confidence
    np.testing.assert_allclose(confidence, np.array([0.55, 0.3, 0.15])[tokens], atol=1e-5)


@pytest.mark.parametrize("options", [
    {"max_new_tokens": 0}, {"steps": 0}, {"threshold": 1.5}, {"temperature": -1}, {"top_p": 0}, {"top_k": -1},
    {"seed": -1}, {"eos_id": -2}, {"acceptance": "guess"}, {"temperature": float("nan")}])
def test_meaningless_settings_are_refused(options):
    with pytest.raises(RequestError, match=next(iter(options))):
        DecodeSettings(**options)
