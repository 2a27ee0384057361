"""Scores of choices against brute force on the toy: one pass, all sets of masks, all orders, and draws."""

from __future__ import annotations

from functools import cache
from itertools import pairwise, permutations

import numpy as np
import pytest
from canvas_loop import CanvasToy
from toy_backend import MASK, VOCAB, N, Toy

from dmoe_export.decoding.mask_sets import mask_sets
from dmoe_export.decoding.score import Scorer
from dmoe_export.decoding.score_settings import ScoreSettings
from dmoe_export.errors import LengthError, NotFiniteError, RequestError
from dmoe_export.runtime.backend import ForwardInputs

TOYS = {"full": {"attention": "full"}, "full, shifted": {"attention": "full", "shift": True}, "blocks": {},
        "blocks, shifted": {"shift": True}}
PROMPT = [5, 9, 7, 3, 11, 8]  # a block and a half


def scores(toy, pairs, **options):
    scorer = Scorer(toy, ScoreSettings(**options))
    for i, (prompt, choice) in enumerate(pairs):
        scorer.check(prompt, [choice], i)
    return list(scorer.scores(pairs))


def score(toy, prompt, choice, **options):
    return scores(toy, [(prompt, choice)], **options)[0]


class Brute:
    """One row, no cache, one place at a time, softmax written out: what the definitions say, word for word."""

    def __init__(self, toy, prompt, choice):
        self.toy, self.text, self.start = toy, [*prompt, *choice], len(prompt)
        self.logp = cache(self._logp)

    def spans(self):
        """Places that are masked together."""
        end = len(self.text)
        if self.toy.description.attention == "full":
            return [range(self.start, end)]
        edges = sorted({self.start, end, *range(-(-self.start // N) * N, end, N)})
        return [range(a, b) for a, b in pairwise(edges)]

    def _logp(self, place, masked):
        """ln p of every token for a masked place, given all that is not masked and not in a later block."""
        full = self.toy.description.attention == "full"
        stop = len(self.text) if full else (place // N + 1) * N
        row = [MASK if i >= len(self.text) or i in masked else self.text[i] for i in range(stop)]
        at = place - self.toy.description.logit_shift
        out = self.toy.forward(ForwardInputs(np.array([row]), np.arange(stop)[None], np.array([[at]]), {},
                                             want_logits=True), self.toy.new_cache(1))
        x = out.logits[0, 0].astype(np.float64)
        x[MASK] = -np.inf
        return x - np.log(np.exp(x).sum())

    def one_pass(self):
        return [self.logp(i, frozenset(span))[self.text[i]] for span in self.spans() for i in span]

    def greedy(self):
        return all(self.logp(i, frozenset(span)).argmax() == self.text[i] for span in self.spans() for i in span)

    def orders(self):
        """The chain rule along every order, of each block the mean."""
        found = 0.0
        for span in self.spans():
            chains = [sum(self.logp(place, frozenset(order[at:]))[self.text[place]] for at, place in enumerate(order))
                      for order in permutations(span)]
            found += np.mean(chains)
        return found


@pytest.mark.parametrize("kind", TOYS)
@pytest.mark.parametrize("length", [1, 2, 5, 6])
def test_one_pass_and_the_exact_bound_equal_brute_force(kind, length):
    choice = [4, 13, 6, 21, 3, 15][:length]
    brute = Brute(Toy(**TOYS[kind]), PROMPT, choice)
    one = score(Toy(**TOYS[kind]), PROMPT, choice)
    assert one.token_log_probabilities == pytest.approx(brute.one_pass(), abs=1e-9) and one.exact
    assert one.log_probability == pytest.approx(sum(brute.one_pass()), abs=1e-9)
    assert one.forwards == len(brute.spans()) + (length >= 3 and kind == "blocks") + (kind == "blocks")
    bound = score(Toy(**TOYS[kind]), PROMPT, choice, estimator="monte_carlo", samples=63)
    assert bound.exact and bound.samples is bound.standard_error is bound.token_log_probabilities is None
    assert bound.log_probability == pytest.approx(brute.orders(), abs=1e-6)
    assert (one.is_greedy, one.tokens) == (bound.is_greedy, bound.tokens) == (brute.greedy(), length)


@pytest.mark.parametrize("kind", TOYS)
def test_of_one_token_all_estimators_say_its_log_probability(kind):
    brute = Brute(Toy(**TOYS[kind]), PROMPT, [4])
    every = brute.logp(len(PROMPT), frozenset([len(PROMPT)]))
    found = [[score(Toy(**TOYS[kind]), PROMPT, [token], estimator=estimator, samples=1).log_probability
              for token in range(VOCAB) if token != MASK] for estimator in ("one_pass", "monte_carlo")]
    assert found[0] == found[1] == pytest.approx(np.delete(every, MASK), abs=1e-9)
    assert np.exp(found[0]).sum() == pytest.approx(1)


@pytest.mark.parametrize("kind", TOYS)
def test_draws_come_close_to_the_exact_bound_within_their_standard_error(kind):
    """Eight tokens: too many sets for the draws, few enough for the truth."""
    choice = [4, 13, 6, 21, 3, 15, 9, 12]
    exact = score(Toy(**TOYS[kind]), PROMPT[:4], choice, estimator="monte_carlo", samples=255, batch=64)
    drawn = [score(Toy(**TOYS[kind]), PROMPT[:4], choice, estimator="monte_carlo", samples=14, seed=seed, batch=64)
             for seed in range(20)]
    assert exact.exact and not any(one.exact for one in drawn) and {one.samples for one in drawn} == {14}
    values, errors = np.array([(one.log_probability, one.standard_error) for one in drawn]).T
    assert len(set(values)) == 20 and (abs(values - exact.log_probability) < 4 * errors).all()
    together = abs(values.mean() - exact.log_probability) / (np.sqrt((errors**2).sum()) / 20)
    assert together < 4 and values.std() < 1.5 * errors.mean()


def test_a_draw_is_of_its_seed_length_and_block_alone():
    sets = mask_sets(8, 32, seed=3, block=1)
    again, *others = (mask_sets(8, 32, *key) for key in [(3, 1), (4, 1), (3, 0)])
    assert (sets.masked == again.masked).all() and sets.drawn == 32 and not sets.weights[0]
    assert all((sets.masked != other.masked).any() for other in others)
    sizes = sets.masked[1:].sum(axis=1)
    assert sorted(sizes) == sorted([*range(1, 9)] * 4)  # spread evenly
    assert sets.weights[1:] == pytest.approx(8 / sizes / 32)


def test_places_and_sizes_are_drawn_evenly():
    places = sum(mask_sets(9, 1, seed, 0).masked[1].astype(int) for seed in range(900))
    sizes = np.bincount([mask_sets(9, 1, seed, 0).masked[1].sum() for seed in range(900)])[1:]
    assert abs(places - 500).max() < 75 and abs(sizes - 100).max() < 45  # 5 and 4.7 standard deviations


def test_weights_of_all_sets_are_those_of_the_draw():
    """Each place is predicted once by them, as by every order."""
    sets = mask_sets(5, 31, 0, 0)
    assert len(sets.masked) == 31 and len(np.unique(sets.masked, axis=0)) == 31 and sets.masked[0].all()
    assert (sets.weights[:, None] * sets.masked).sum(axis=0) == pytest.approx(1)


@pytest.mark.parametrize("kind", TOYS)
@pytest.mark.parametrize("estimator", ["one_pass", "monte_carlo"])
def test_neighbours_and_batches_change_no_bit(kind, estimator):
    rng = np.random.default_rng(5)
    prompts = [PROMPT, PROMPT, [7] * 9, [3], PROMPT[:4], [4, 6] * 8]
    sizes = (3, 9, 1, 6, 5, 2)
    pairs = [(prompt, rng.integers(3, VOCAB, size).tolist()) for prompt, size in zip(prompts, sizes, strict=True)]
    options = {"estimator": estimator, "samples": 6, "seed": 2}
    alone = [score(Toy(**TOYS[kind], max_tokens=32), *pair, **options) for pair in pairs]
    for batch in (1, 2, 5, 64):
        beside = scores(Toy(**TOYS[kind], max_tokens=32), pairs, batch=batch, **options)
        assert [(one.log_probability, one.standard_error, one.is_greedy) for one in beside] == [
            (one.log_probability, one.standard_error, one.is_greedy) for one in alone]


def test_the_prompt_is_computed_once_for_all_choices_and_in_chunks():
    """Of 21 tokens whole blocks are 20; an engine takes 8 at a time. Choices end in their first and second block."""
    toy = Toy(max_tokens=8)
    scores(toy, [([3] * 21, [4, 5]), ([3] * 21, [4, 5, 6, 7]), ([3] * 21, [8, 5, 6, 7])])
    assert [(*inputs.input_ids.shape, inputs.want_logits) for inputs in toy.seen] == [
        (1, 8, False), (1, 8, False), (1, 4, False), (3, 4, True), (2, 4, False), (2, 4, True)]
    assert toy.seen[3].input_ids.tolist() == [[3, 2, 2, 2]] * 3  # behind the choice it is masked
    assert toy.seen[4].input_ids.tolist() == [[3, 4, 5, 6], [3, 8, 5, 6]]  # true tokens


def test_rows_of_a_forward_are_bounded_by_engine_and_memory(monkeypatch):
    toy = Toy(attention="full")
    toy.limits = type(toy.limits)(max_batch=3)
    scores(toy, [(PROMPT, [4, 5])] * 7)
    assert [len(inputs.input_ids) for inputs in toy.seen] == [3, 3, 1]
    monkeypatch.setattr("dmoe_export.decoding.score._MOST_LOGITS", 2 * 2 * VOCAB * 4)
    toy = Toy(attention="full")
    scores(toy, [(PROMPT, [4, 5])] * 5)
    assert [len(inputs.input_ids) for inputs in toy.seen] == [2, 2, 1]


@pytest.mark.parametrize(("prompt", "choice", "sentence"), [
    ([5], [], "Choice 0 of prompt 4 is empty; give at least one token."),
    ([5], [3, MASK], "Choice 0 of prompt 4 holds token id 2, the mask, which is never an answer; leave it out."),
    ([5], [VOCAB], "Choice 0 of prompt 4 holds token id 24, outside the vocabulary 0 … 23."),
    ([], [3], "Prompt 4 is empty; give at least one token."),
    ([VOCAB], [3], "Prompt 4 holds token id 24, outside the vocabulary 0 … 23."),
], ids=lambda value: value if isinstance(value, str) else "")
def test_what_has_no_score_is_refused(prompt, choice, sentence):
    with pytest.raises(RequestError) as refused:
        Scorer(Toy(), ScoreSettings()).check(prompt, [choice], 4)
    assert str(refused.value) == sentence


def test_models_of_random_tokens_have_no_such_likelihood():
    with pytest.raises(RequestError) as refused:
        Scorer(CanvasToy(), ScoreSettings())
    assert str(refused.value) == ("Family toy denoises random tokens and has no masks, so no choice has such a "
                                  "likelihood; compare its answers with generate.")


def test_what_is_too_long_is_refused():
    with pytest.raises(LengthError, match="need 2001 positions, the model has 2000"):
        Scorer(Toy(), ScoreSettings()).check([5] * 1999, [[3, 3]])
    with pytest.raises(LengthError, match="need forwards of 9 tokens, the engine takes at most 8"):
        Scorer(Toy(attention="full", max_tokens=8), ScoreSettings()).check(PROMPT, [[3, 3, 3]])
    Scorer(Toy(max_tokens=8), ScoreSettings()).check(PROMPT, [[3, 3, 3]])  # blocks by themselves fit


def test_cancelling_is_looked_at_between_forwards():
    toy, looks = Toy(), iter([False, False, True])
    with pytest.raises(RequestError, match=r"^Scoring was cancelled before all choices had their scores; ask again"):
        list(Scorer(toy, ScoreSettings(batch=1)).scores([(PROMPT, [4, 5])] * 2, lambda: next(looks)))
    assert len(toy.seen) == 2  # the prompt, the first choice


def test_numbers_that_are_none_are_no_score():
    class Broken(Toy):
        def forward(self, inputs, cache):
            outputs = super().forward(inputs, cache)
            outputs.confidence[-1, 0] = np.nan
            return outputs

    with pytest.raises(NotFiniteError, match=r"^Choice 1 gets no score: the model computes NaN or infinity, in fp16 "):
        list(Scorer(Broken(attention="full"), ScoreSettings(), "fp16").scores([(PROMPT, [4])] * 2))


def test_a_token_that_cannot_be_has_probability_zero():
    class Never(Toy):
        def forward(self, inputs, cache):
            outputs = super().forward(inputs, cache)
            if outputs.logits is not None:
                outputs.logits[..., 7] = -np.inf
            return outputs

    for estimator in ("one_pass", "monte_carlo"):
        found = score(Never(attention="full"), PROMPT, [4, 7, 5], estimator=estimator, samples=4)
        assert found.log_probability == -np.inf and not found.is_greedy and found.standard_error is None
        assert found.as_dict()["log_probability"] is None
