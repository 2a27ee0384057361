"""Tokens wanted by rows of a batch, packed for the vocabulary's head: the same tokens, none of an earlier row."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import SAMPLE
from hypothesis import given
from hypothesis import strategies as st

from dmoe_export.runtime.backend import ForwardInputs
from dmoe_export.runtime.cpu.backend import OnnxRuntimeBackend
from dmoe_export.runtime.cpu.wanted import Wanted


def drawn(rng, rows, tokens, wide):
    """Each row wants some tokens, at any of its places."""
    logit_rows = np.full((rows, wide), -1, np.int64)
    for row in logit_rows:
        count = rng.integers(0, min(wide, tokens) + 1)
        row[rng.permutation(wide)[:count]] = rng.permutation(tokens)[:count]
    return logit_rows


@given(st.integers(0, 2**32), st.integers(1, 9), st.integers(1, 40), st.integers(1, 33))
def test_every_wanted_token_is_named_once_and_comes_back(seed, rows, tokens, wide):
    logit_rows = drawn(np.random.default_rng(seed), rows, tokens, wide)
    wanted = Wanted(logit_rows, tokens)
    packed = wanted.logit_rows
    counts = (logit_rows >= 0).sum(axis=1)
    assert packed.shape[1] <= wide and ((packed >= 0).sum() == counts.sum())
    assert packed.shape[1] <= max(1, counts.max()) and packed.shape[1] >= -(-counts.sum() // rows)
    first = np.arange(rows)[:, None] * tokens
    assert (first + packed < rows * tokens).all()
    taken = np.arange(rows * tokens)[first + packed.clip(min=0)]  # as the graph takes them
    assert (wanted.spread(taken)[logit_rows >= 0] == (first + logit_rows)[logit_rows >= 0]).all()
    assert wanted.spread(np.stack([taken, taken], axis=-1)).shape == (*logit_rows.shape, 2)


def test_equal_wishes_stay_as_they_are():
    logit_rows = np.array([[3, 1], [0, 2]])
    wanted, results = Wanted(logit_rows, 4), np.arange(4).reshape(2, 2)
    assert wanted.logit_rows is logit_rows and wanted.spread(results) is results


@pytest.mark.parametrize("want_logits", [False, True])
def test_the_numbers_of_a_forward_are_those_of_padded_rows(exported, want_logits):
    """Against the graph with as many places in every row."""
    backend = OnnxRuntimeBackend(exported(SAMPLE), threads=1)
    rng, n = np.random.default_rng(0), backend.routing.block_length
    ids = rng.integers(0, backend.description.vocab_size, (4, n))
    logit_rows = drawn(rng, 4, n, n)
    logit_rows[2], logit_rows[3] = -1, np.arange(n)
    everything = np.tile(np.arange(n), (4, 1))
    positions = np.tile(np.arange(n), (4, 1))
    found, padded = (backend.forward(ForwardInputs(ids, positions, rows, {}, want_logits), backend.new_cache(4))
                     for rows in (logit_rows, everything))
    for b, m in zip(*np.nonzero(logit_rows >= 0), strict=True):
        token = logit_rows[b, m]
        assert found.token_ids[b, m] == padded.token_ids[b, token]
        assert found.confidence[b, m] == pytest.approx(padded.confidence[b, token], rel=1e-5)
        if want_logits:
            assert np.allclose(found.logits[b, m], padded.logits[b, token], atol=1e-4)
    backend.close()
