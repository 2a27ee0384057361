"""Answers that must match: whatever the model says, they do, and a step takes what going through all fillings says."""

from __future__ import annotations

import itertools
import re
from functools import cache

import numpy as np
import pytest
from grammars import answers, grammar_of, is_answer
from salient_helpers import make_model
from scripted import Scripted
from toy_backend import EOS, MASK, VOCAB, Toy

from dmoe_export.decoding.batch import JoiningBatch
from dmoe_export.decoding.settings import ACCEPTANCES, DecodeSettings
from dmoe_export.decoding.template import Gap, template_of
from dmoe_export.decoding.way import Way
from dmoe_export.description import EditTokens
from dmoe_export.errors import NotFiniteError, RequestError
from dmoe_export.grammar.automaton import DEAD, automaton_of
from dmoe_export.model.backend import EagerBackend

NAMES = ["a", "EOS", "MASK", *"bcde123{}", '"', ":", ",", "ab", "abc", "12", '{"', '":', '"}', "é", "0", "."]
PIECES = [b"" if i in (EOS, MASK) else name.encode() for i, name in enumerate(NAMES)]
ID = {name: i for i, name in enumerate(NAMES)}
assert len(PIECES) == VOCAB
REGEXES = [r'\{"[a-e]{1,3}":[123]+(,[123]+)?\}', r"(ab|12)*é", r"[0-9]{1,3}\.[0-9]{2}", r"[a-e]+", r"abc|", r"é{30}"]


@cache
def grammar(regex):
    return grammar_of(automaton_of(regex), PIECES)


def way(backend, regex, template=None, **options):
    return Way(backend, DecodeSettings(regex=regex, **options), template=template, grammar=grammar(regex))


def decode(backend, ways, prompts):
    """Of every prompt its answer's tokens, and its last block."""
    batch = JoiningBatch(backend, len(prompts))
    rows = [batch.add(prompt, one, i) for i, (prompt, one) in enumerate(zip(prompts, ways, strict=True))]
    tokens, last = [[] for _ in rows], {}
    while len(batch):
        for done in batch.step():
            if done.error:
                raise done.error
            place = rows.index(done.handle)
            tokens[place] += done.token_ids
            last[place] = done
    return tokens, [last[i] for i in range(len(rows))]


def alone(backend, prompt, one):
    tokens, last = decode(backend, [one], [prompt])
    return tokens[0], last[0]


def text(tokens):
    assert all(PIECES[token] for token in tokens)
    return b"".join(PIECES[token] for token in tokens).decode()


def check(regex, tokens, last, budget, steps=99):
    """A whole match, or as many tokens as may be that begin one, where none is as short."""
    decoded = last.statistics.forwards_by_phase
    assert decoded["denoise"] + decoded["full"] <= steps * last.statistics.blocks
    assert last.statistics.constrained_tokens is not None and last.statistics.grammar_seconds > 0
    if last.finish_reason == "length":
        assert len(tokens) == budget and grammar(regex).automaton.run(b"".join(PIECES[t] for t in tokens)) != DEAD
        assert regex == r"é{30}" or (budget < 4 and regex in REGEXES[:3])
        return
    assert last.finish_reason == "eos" and re.fullmatch(regex, text(tokens)), text(tokens)


CASES = [("block_causal", "block"), ("block_causal", "none"), ("full", "prefix"), ("full", "dual"), ("full", "none")]


@pytest.mark.parametrize(("attention", "cache_name"), CASES)
@pytest.mark.parametrize("acceptance", ACCEPTANCES)
def test_every_answer_matches_whatever_the_model_wants(attention, cache_name, acceptance):
    rng = np.random.default_rng(ACCEPTANCES.index(acceptance))
    for regex in REGEXES:
        budget = int(rng.integers(2, 15))
        options = {"max_new_tokens": budget, "steps": int(rng.integers(1, 6)), "threshold": float(rng.random()),
                   "temperature": float(rng.integers(0, 2)), "top_k": int(rng.choice([0, 5])), "cache": cache_name,
                   "early_stop": bool(rng.integers(0, 2)), "acceptance": acceptance}
        backend = Toy(attention)
        prompts = [rng.integers(3, VOCAB, rng.integers(1, 7)).tolist() for _ in range(3)]
        ways = [way(backend, regex, seed=i, **options) for i in range(3)]
        tokens, last = decode(backend, ways, prompts)
        for i, prompt in enumerate(prompts):
            check(regex, tokens[i], last[i], budget, options["steps"])
            mine, _ = alone(backend, prompt, way(backend, regex, seed=2 * i, **options))  # row i draws with seed + i
            assert mine == tokens[i]


@pytest.mark.parametrize("acceptance", ACCEPTANCES)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_grammar_that_allows_everything_changes_nothing(acceptance, temperature):
    everything = [b"x" if i not in (EOS, MASK) else b"" for i in range(VOCAB)]
    free = grammar_of(automaton_of("x*"), everything)
    for attention, seed in itertools.product(("block_causal", "full"), range(4)):
        backend = Toy(attention)
        options = {"max_new_tokens": 11, "steps": 3, "threshold": 0.5, "acceptance": acceptance, "seed": seed,
                   "temperature": temperature, "top_p": 0.9, "top_k": 6 * (seed % 2)}
        bound = Way(backend, DecodeSettings(regex="x*", **options), grammar=free)
        plain = Way(backend, DecodeSettings(**options))
        mine, last = alone(backend, [5, 6, 7 + seed], bound)
        wanted, _ = alone(backend, [5, 6, 7 + seed], plain)
        assert mine == wanted and last.finish_reason == "eos" and last.statistics.constrained_tokens == 0


def _by_all_fillings(automaton, pieces, scores, ends, barred):
    """One token at a time, the best of all places and tokens that some filling has: what a step should do."""
    n, count = scores.shape[1:]
    tokens = [-1] * n
    for step in range(n):
        logits = scores[step].astype(np.float64)
        logits[:, barred] = -np.inf
        shares = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
        fillings = answers(count, tokens, lambda one: is_answer(automaton, pieces, one, 0, ends, barred))
        best = max((shares[i, t], -i, -t) for i in range(n) if tokens[i] < 0 for t in set(fillings[:, i]))
        place, token = -int(best[1]), -int(best[2])
        tokens[place] = token
        if any(t in ends and -1 not in tokens[:i] for i, t in enumerate(tokens)):
            break
    return tokens


@pytest.mark.parametrize("regex", [r"(ab|c)*a?", r"c?a{2,3}", r"b(a|bc)+|a"])
def test_a_step_takes_the_best_token_that_some_filling_has(regex):
    pieces, automaton = [b"a", b"b", b"ab", b"c", b"", b""], automaton_of(regex)
    compared = grammar_of(automaton, pieces)
    for seed in range(12):
        n = 3 + seed % 2
        scores = np.random.default_rng(seed).normal(0, 3, (n, n, 6)).astype(np.float32)
        backend = Scripted(lambda count, positions, ids: scores[count][positions - 4], 4, 6, 5, (4,), attention="full")  # noqa: B023
        settings = DecodeSettings(regex=regex, max_new_tokens=n, block_length=n, steps=n, acceptance="fixed",
                                  cache="none")
        tokens, last = alone(backend, [0, 0, 0, 0], Way(backend, settings, grammar=compared))
        wanted = _by_all_fillings(automaton, pieces, scores, [4], [5])
        wanted = wanted[:wanted.index(4)] if 4 in wanted else wanted
        assert tokens == wanted and last.finish_reason == "eos"


@pytest.mark.parametrize("attention", ["block_causal", "full"])
def test_given_places_take_part(attention):
    backend, regex = Toy(attention), REGEXES[0]
    parts = [[ID['{"']], Gap(2), [ID['"'], ID[":"]], Gap(3)]
    for seed in range(6):
        one = way(backend, regex, template_of(parts, None), steps=1 + seed, temperature=seed % 2, seed=seed)
        tokens, last = alone(backend, [5, 6 + seed], one)
        check(regex, tokens, last, 8)
        assert [tokens[i] for i in (0, 3, 4)] == [ID['{"'], ID['"'], ID[":"]]
    closed = template_of([*parts, [ID["}"]]], None)
    tokens, last = alone(backend, [5], way(backend, regex, closed))
    assert last.finish_reason == "filled" and len(tokens) == 9 and re.fullmatch(regex, text(tokens))
    with pytest.raises(RequestError, match=r"^No filling of the template's gaps in 4 tokens matches regex; change one"):
        way(backend, regex, template_of([Gap(3), [ID["é"]]], None))


def test_tokens_without_a_chance_are_taken_where_nothing_else_matches():
    """The model gives all that is allowed no chance at all, and says nothing but the mask and the end."""
    def says(count, positions, ids):
        logits = np.full((len(positions), VOCAB), -np.inf)
        logits[:, [EOS, MASK]] = 5, 9
        return logits

    for options in ({}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3}, {"acceptance": "credit"}):
        backend = Scripted(says, 4, VOCAB, MASK, (EOS,))
        tokens, last = alone(backend, [3], way(backend, r"[0-9]{2,3}\.0", max_new_tokens=9, steps=3, **options))
        assert re.fullmatch(r"[0-9]{2,3}\.0", text(tokens)) and last.finish_reason == "eos"
        assert last.statistics.constrained_tokens >= 3


def test_numbers_that_are_not_finite_are_an_error_and_no_answer():
    for options in ({}, {"temperature": 1.0}):
        backend = Scripted(lambda count, positions, ids: np.full((len(positions), VOCAB), np.nan), 4, VOCAB, MASK,
                           (EOS,))
        with pytest.raises(NotFiniteError):
            alone(backend, [3], way(backend, "a*", **options))


def test_an_answer_without_end_tokens_is_as_long_as_may_be():
    backend = Toy()
    tokens, last = alone(backend, [5], way(backend, r"(ab|a|b)*", eos_id=-1, max_new_tokens=7))
    assert len(tokens) == 7 and last.finish_reason == "eos" and re.fullmatch(r"(ab|a|b)*", text(tokens))
    with pytest.raises(RequestError, match=r"^No answer in 7 tokens matches regex; change one of them\.$"):
        way(backend, "ab?", eos_id=-1, max_new_tokens=7)


@pytest.mark.parametrize("kind", ["dense", "block"])
def test_salient_steps(kind):
    """Of an eager model with random weights."""
    backend = EagerBackend(make_model(kind, 3))
    letters = [bytes([97 + i % 26]) for i in range(59)] + [b"", b""]
    regex = r"([ac][bd]){8,}z"
    pairs = grammar_of(automaton_of(regex), letters)
    for acceptance in ("fixed", "threshold"):
        settings = DecodeSettings(regex=regex, max_new_tokens=21, steps=4, acceptance=acceptance, full_steps=1,
                                  salient_threshold=0.99, refresh_interval=2)
        tokens, last = alone(backend, [3, 1, 4, 1, 5, 9, 2, 6, 5], Way(backend, settings, grammar=pairs))
        assert last.finish_reason == "eos" and last.statistics.salient_by_step
        assert re.fullmatch(regex.encode(), b"".join(letters[token] for token in tokens))


def test_what_does_not_go_together_is_refused_at_once():
    with pytest.raises(RequestError, match=r"^regex and json_schema both say what the answer matches; give one"):
        DecodeSettings(regex="a", json_schema={})
    with pytest.raises(RequestError, match=r"^stop would cut an answer that must match as a whole"):
        DecodeSettings(regex="a", stop="b")
    edits = Toy(edit_tokens=EditTokens(delete=5, split=6))
    for options in ({"edit_threshold": 0.5}, {"edit_threshold": 0.0, "edit_blocks": 1},
                    {"edit_threshold": 0.0, "insert_delete": True}):
        with pytest.raises(RequestError, match=r"^regex does not go with edit_threshold, as an edited answer"):
            way(edits, "a*", **options)
    with pytest.raises(RequestError, match=r"^regex needs the texts of tokens, and the bundle has no tokenizer; leave"):
        JoiningBatch(Toy(), 1).way(DecodeSettings(regex="a"))
    with pytest.raises(RequestError, match=r"^json_schema needs the texts of tokens"):
        JoiningBatch(Toy(), 1).way(DecodeSettings(json_schema="{}"))


def test_control_tokens_that_edit_never_stand_in_an_answer():
    """Behind the end, too, where any other token may."""
    backend = Toy(edit_tokens=EditTokens(delete=3, split=4))
    for seed in range(8):
        one = way(backend, "(b|c|d)?", max_new_tokens=8, temperature=2.0, seed=seed)
        tokens, _ = alone(backend, [5, seed + 6], one)
        assert tokens in ([], [5])  # b and c are 3 and 4
