"""The rule of a canvas is held against all of its fillings."""

from __future__ import annotations

import numpy as np
from grammars import answers, grammar_of, is_answer, random_automaton

from dmoe_export.grammar.canvas import MASKED, Canvas, Rule

EOS, PAD, MASK = 6, 7, 8
PIECES = [b"a", b"b", b"ab", b"c", b"ca", b" a", b"", b"", b""]
COUNT = len(PIECES)


def _cases():
    rng = np.random.default_rng(0)
    for number in range(400):
        automaton = random_automaton(rng, int(rng.integers(1, 7)))
        if automaton is not None:
            n = int(rng.integers(1, 5))
            given = np.where(rng.random(n) < 0.2, rng.integers(0, 5, n), MASKED)
            closed = max((i + 1 for i, token in enumerate(given) if token != MASKED), default=0)
            yield rng, automaton, given.tolist(), closed, [[EOS], [EOS, PAD], []][number % 3], number % 2 == 1


def test_every_token_and_every_set_of_tokens_is_allowed_just_where_a_filling_has_it():
    """Places are taken in any order, in blocks of any size; what is allowed then is what all fillings together have."""
    checked = taken = 0
    for rng, automaton, given, closed, ends, spaced in _cases():
        grammar = grammar_of(automaton, PIECES, spaced)
        rule = Rule(grammar.steps, given, closed, ends, [MASK])
        whole = answers(COUNT, given, lambda one: is_answer(automaton, PIECES, one, closed, ends, [MASK], spaced))  # noqa: B023
        assert rule.fits == bool(len(whole))
        if not rule.fits:
            continue
        done, block = list(given), int(rng.integers(1, len(given) + 1))
        for first in range(0, len(given), block):
            canvas = Canvas(rule, done[:first], done[first:first + block])
            places = [i for i, token in enumerate(done[first:first + block]) if token == MASKED]
            for place in rng.permutation(places).tolist():
                assert canvas.good
                for other in places:
                    if done[first + other] == MASKED:
                        allowed = np.isin(np.arange(COUNT), whole[:, first + other])
                        assert canvas.allowed(other).tolist() == allowed.tolist()
                        assert [canvas.allows(other, token) for token in range(COUNT)] == allowed.tolist()
                        checked += 1
                token = int(rng.choice(np.flatnonzero(canvas.allowed(place))))
                canvas.take(place, token)
                done[first + place], whole = token, whole[whole[:, first + place] == token]
                taken += 1
        assert whole.tolist() == [done]
    assert checked > 300 and taken > 150


def test_where_nothing_as_short_matches_answers_begin_a_match():
    """All beginnings of all matches, however long these are, and nothing else."""
    seen = 0
    for _, automaton, given, _, ends, _ in _cases():
        rule = Rule(grammar_of(automaton, PIECES).steps, [MASKED] * len(given), 0, ends, [MASK])
        if rule.fits:
            continue
        go_on = {state for state in range(1, automaton.states) if automaton.accepting[state]}
        while more := {state for state in range(1, automaton.states) for piece in PIECES[:EOS]
                       if automaton.run(piece, state) in go_on} - go_on:
            go_on |= more
        begun = answers(COUNT, [MASKED] * len(given), lambda one: max(one) < EOS and automaton.run(  # noqa: B023
            b"".join(PIECES[token] for token in one)) in go_on)  # noqa: B023
        assert rule.good == bool(len(begun))
        if rule.good:
            canvas = Canvas(rule, [], [MASKED] * len(given))
            for place in range(len(given)):
                assert canvas.allowed(place).tolist() == np.isin(np.arange(COUNT), begun[:, place]).tolist()
            seen += 1
    assert seen >= 8


def test_places_behind_the_answer_are_free():
    automaton = random_automaton(np.random.default_rng(5), 4)
    rule = Rule(grammar_of(automaton, PIECES).steps, [MASKED] * 2, 0, [EOS], [MASK])
    canvas = Canvas(rule, [], [MASKED] * 4)
    assert canvas.good and canvas.allows(3, PAD) and not canvas.allows(3, MASK)
    assert canvas.allowed(2).tolist() == [token != MASK for token in range(COUNT)]
    before = [canvas.allowed(place).tolist() for place in (0, 1)]
    canvas.take(2, 0)
    assert [canvas.allowed(place).tolist() for place in (0, 1)] == before
