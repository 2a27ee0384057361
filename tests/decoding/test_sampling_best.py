"""Drawing from the best few tokens gives the same tokens as from all logits, bit for bit; and who asks for which."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from candidates_helpers import draw
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy_backend import MASK, VOCAB, Toy, decode

from dmoe_export.decoding.sampling import draws_from, sample, sample_best, without
from dmoe_export.decoding.settings import DecodeSettings
from dmoe_export.errors import NotFiniteError
from dmoe_export.runtime.candidates import MOST, best_of

OFTEN = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def sorted_tokens(logits, asked, rng):
    """The definition: tokens in the order of their logits, the lower first of equal ones."""
    for row, u in zip(logits, rng.random(len(logits)), strict=True):
        order = np.argsort(-row, kind="stable")[:asked.top_k or None]
        shares = np.exp(row[order] / asked.temperature - (row[order] / asked.temperature).max())
        below = (shares / shares.sum()).cumsum()
        if asked.top_p < 1:
            below = below[:int(np.searchsorted(below, asked.top_p)) + 1]
        yield int(order[min(int(np.searchsorted(below, u * below[-1], side="right")), len(below) - 1)])


@OFTEN
@given(st.integers(2, 900), st.integers(0, 300), st.floats(0.05, 4), st.sampled_from([1.0, 0.95, 0.5, 1e-9]),
       st.sampled_from(["spread", "near", "few", "equal"]), st.integers(0, 2**32 - 1))
def test_numbers_are_sorted_and_tokens_found(vocabulary, top_k, temperature, top_p, kind, seed):
    rng = np.random.default_rng(seed)
    logits = without(draw(rng, (1, 20, vocabulary), kind)[0], int(rng.integers(vocabulary)))
    asked = DecodeSettings(temperature=temperature, top_k=top_k, top_p=top_p)
    tokens, _ = sample(logits, asked, np.random.default_rng(seed))
    assert tokens.tolist() == list(sorted_tokens(logits, asked, np.random.default_rng(seed)))


@OFTEN
@given(st.integers(2, 900), st.integers(1, 300), st.floats(0.05, 4), st.sampled_from([1.0, 0.95, 0.5, 1e-9]),
       st.sampled_from(["spread", "near", "few", "equal"]), st.integers(0, 300), st.integers(0, 2**32 - 1))
def test_the_same_tokens_as_from_all_logits(vocabulary, top_k, temperature, top_p, kind, more, seed):
    """20 draws a case; also where the vocabulary is smaller, and where another row asked for more."""
    rng = np.random.default_rng(seed)
    logits = draw(rng, (1, 20, vocabulary), kind)
    mask = int(rng.integers(vocabulary))
    asked = DecodeSettings(temperature=temperature, top_k=top_k, top_p=top_p)
    want, certain = sample(without(logits[0], mask), asked, np.random.default_rng(seed))
    count = min(max(draws_from(asked, vocabulary), more), vocabulary)
    found, allowed = best_of(logits, mask, count), without(logits[0], mask)
    best = (1 / np.exp(allowed - allowed.max(-1, keepdims=True)).sum(-1)).astype(np.float32)
    tokens, confidence = sample_best(found.token_ids[0], found.logits[0], best, asked, np.random.default_rng(seed))
    assert tokens.dtype == want.dtype and tokens.tolist() == want.tolist()
    np.testing.assert_allclose(confidence, certain, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize(("options", "count"), [
    ({"temperature": 1.0, "top_k": 5}, 5), ({"temperature": 1.0, "top_k": 5, "top_p": 0.5}, 5),
    ({"temperature": 1.0, "top_k": MOST}, MOST), ({"temperature": 1.0, "top_k": 5000}, 0), ({"temperature": 1.0}, 0),
    ({"temperature": 1.0, "top_p": 0.9}, 0), ({"top_k": 5}, 0),
    ({"temperature": 1.0, "top_k": 5, "acceptance": "credit"}, 0)])
def test_when_the_best_are_enough(options, count):
    assert draws_from(DecodeSettings(**options), 157_184) == count
    assert draws_from(DecodeSettings(**options), 4) == min(count, 4)


class Generous(Toy):
    """Gives more candidates than were asked for, as where another row of the batch wants more."""

    def forward(self, inputs, cache):
        count, self.asked = inputs.candidates, getattr(self, "asked", [])
        self.asked.append((inputs.want_logits, count))
        outputs = super().forward(replace(inputs, want_logits=True, candidates=0), cache)
        return replace(outputs, candidates=best_of(outputs.logits, MASK, VOCAB)) if count else outputs


PROMPTS = [[5, 6, 7, 8, 9], [4, 4], [9, 8, 7, 6, 5, 4, 3]]


def test_rows_ask_for_what_they_draw_from():
    options = {"max_new_tokens": 12, "eos_id": -1, "temperature": 0.8, "seed": 5}
    for extra, asked in (({"top_k": 3}, {(False, 0), (False, 3)}), ({"top_k": 200}, {(False, 0), (False, VOCAB)}),
                         ({}, {(False, 0), (True, 0)}), ({"top_p": 0.9}, {(False, 0), (True, 0)})):
        backend = Generous()
        got = decode(backend, PROMPTS, **options, **extra)[0]
        assert set(backend.asked) <= asked and any(one != (False, 0) for one in backend.asked)
        assert got == decode(Toy(), PROMPTS, **options, **extra)[0]


def test_a_best_logit_that_is_not_finite_ends_the_answer():
    class Bad(Toy):
        def forward(self, inputs, cache):
            outputs = super().forward(inputs, cache)
            if inputs.candidates:
                values = np.full_like(outputs.candidates.logits, np.inf)
                outputs = replace(outputs, candidates=replace(outputs.candidates, logits=values))
            return outputs

    with pytest.raises(NotFiniteError, match="Prompt 0 gets no answer"):
        decode(Bad(), PROMPTS[:1], max_new_tokens=8, temperature=1.0, top_k=3)


@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-300, 1e-9])
@pytest.mark.parametrize("more", [{}, {"top_p": 0.5}, {"top_k": 3}])
def test_almost_no_temperature_takes_the_best(temperature, more):
    """Logits over it are beyond float64, and what was drawn then was the mask, again and again."""
    logits, mask = np.random.default_rng(0).normal(0, 8, (1, 50, 40)).astype(np.float32), 7
    asked = DecodeSettings(temperature=temperature, **more)
    best = without(logits[0], mask).argmax(axis=-1)
    tokens, _ = sample(without(logits[0], mask), asked, np.random.default_rng(1))
    assert tokens.tolist() == best.tolist()
    if asked.top_k:
        found = best_of(logits, mask, asked.top_k)
        drawn, _ = sample_best(found.token_ids[0], found.logits[0], np.ones(50, np.float32), asked,
                               np.random.default_rng(1))
        assert drawn.tolist() == best.tolist()
