"""Scores of real models against forwards by hand, one row at a time and without a cache."""

from __future__ import annotations

import numpy as np
import pytest
from bundles import eager
from device_helpers import host_backend

from dmoe_export.decoding.score import Scorer
from dmoe_export.decoding.score_settings import ScoreSettings
from dmoe_export.runtime.backend import ForwardInputs

MODELS = {"llada_dense": {}, "dream": {}, "llada2_dmoe": {}, "sdar_moe": {"mode": "token", "block_length": 4}}


@pytest.fixture(scope="module", params=[*MODELS, "device"])
def backend(request, golden):
    """`device`: the GPU backends' half, on host memory."""
    if request.param == "device":
        return host_backend(request.getfixturevalue("golden_bundle"), cuda_graphs=True)
    return eager(golden.parent / request.param / "model", **MODELS[request.param])


def by_hand(backend, prompt, choice, masked, settings):
    """ln p of the masked places of the first block that the choice touches."""
    d, n = backend.description, backend.routing.block_length
    text = np.array([*prompt, *choice])
    stop = len(text) if d.attention == "full" else (len(prompt) // n + 1) * n
    row = np.full(stop, d.mask_id)
    row[:min(stop, len(text))] = text[:stop]
    places = len(prompt) + np.flatnonzero(masked)
    row[places] = d.mask_id
    out = backend.forward(ForwardInputs(row[None], np.arange(stop)[None], places[None] - d.logit_shift, settings,
                                        want_logits=True), backend.new_cache(1))
    x = out.logits[0].astype(np.float64)
    x[:, d.mask_id] = -np.inf
    return (x - np.log(np.exp(x).sum(axis=1, keepdims=True)))[np.arange(len(places)), text[places]]


def test_scores_are_those_of_forwards_by_hand(backend):
    """Prompts of several lengths side by side, of which one fills its blocks; two tokens, so three sets of masks."""
    d, n, rng = backend.description, backend.routing.block_length, np.random.default_rng(3)
    settings = {"coreset_top_p": 0.4} if backend.routing.mode == "top_p" else {}
    ids = np.delete(np.arange(d.vocab_size), d.mask_id)
    pairs = [(rng.choice(ids, length).tolist(), rng.choice(ids, 2).tolist()) for length in (2 * n, n + 1, 2, 2 * n)]
    pairs.append((pairs[0][0], rng.choice(ids, 2).tolist()))
    routing = {"top_p": 0.4} if settings else {}
    one, bound = (list(Scorer(backend, ScoreSettings(estimator=name, samples=3, batch=4, **settings)).scores(pairs))
                  for name in ("one_pass", "monte_carlo"))
    for (prompt, choice), score, exact in zip(pairs, one, bound, strict=True):
        both, first, second = (by_hand(backend, prompt, choice, masked, routing) for masked in (
            (True, True), (True, False), (False, True)))
        assert score.token_log_probabilities == pytest.approx(both, abs=2e-4)
        assert exact.exact and exact.log_probability == pytest.approx((both.sum() + first[0] + second[0]) / 2, abs=2e-4)
