"""Automata of regular expressions are held against Python's `re`, and what would hurt is refused."""

from __future__ import annotations

import itertools
import random
import re

import numpy as np
import pytest
from grammars import grammar_of

from dmoe_export.errors import CheckError, MissingRequirementError, RequestError
from dmoe_export.grammar import automaton as module
from dmoe_export.grammar.automaton import DEAD, automaton_of
from dmoe_export.grammar.grammar import Grammars
from dmoe_export.grammar.vocabulary import Vocabulary

EXPRESSIONS = [r"(ab|a)*c?", r"[^a]{1,3}", r"a+(b|é)?", r"(?i)aB|c", r"\x00|a\n", r"(a{2,3}|bc){0,2}", r".?ß",
               r"[ab]*é[^b]", r"aé?", r"(a|ab)(c|bcé)?", r"", r"(a|)(|bb)", r"a{2}|\W", r"(?s).*"]


@pytest.mark.parametrize("regex", EXPRESSIONS)
def test_all_short_texts_match_as_in_python(regex):
    automaton = automaton_of(regex)
    for count in range(4):
        for letters in itertools.product("abcBé\nß\x00", repeat=count):
            text = "".join(letters)
            assert automaton.matches(text.encode()) == bool(re.fullmatch(regex, text)), text


@pytest.mark.parametrize("regex", [r'"(?:[^"\\]|\\["n]){0,100}"', r"x?(a|xb){0,200}"])
def test_matches_are_not_searched_for_anywhere(regex):
    """That has exponentially more states, and is what the library does by itself."""
    assert automaton_of(regex).states < 1500


def test_a_state_from_which_nothing_matches_is_the_dead_one():
    """Every other one is on the way from the start to a match."""
    automaton = automaton_of(r"(ab|ac)d[xyz]{0,9}|q")
    table = automaton.table
    assert not table[DEAD].any() and not table[:, 0].any() and not automaton.accepting[DEAD]
    there = {automaton.start}
    while more := {int(state) for one in there for state in table[one]} - there - {DEAD}:
        there |= more
    assert there == set(range(1, automaton.states))
    useful = automaton.accepting.copy()
    for _ in range(automaton.states):
        useful |= useful[table].any(axis=1)
    assert useful[1:].all()
    assert automaton.run(b"abe") == automaton.run("é".encode()) == DEAD


@pytest.mark.parametrize("regex", [r" a*| b", r"a*", r"[^ ]?", r".*", r" ?"])
def test_a_leading_space_that_decoding_takes_away(regex):
    automaton, spaced = automaton_of(regex), automaton_of(regex).behind_a_space()
    for count in range(4):
        for letters in itertools.product(" ab", repeat=count):
            text = "".join(letters)
            read = text[1:] if text.startswith(" ") else text
            assert spaced.matches(text.encode()) == automaton.matches(read.encode()) == bool(re.fullmatch(regex, read))


@pytest.mark.parametrize(("regex", "why"), [
    ("(a", "outlines-core takes"), ("a)(?:b", "outlines-core takes"), ("(?=a)b", "knows no look-around"),
    (r"a\b", "outlines-core takes"),
    ("^a$", "anchors"), (r"[^\s\S]", "outlines-core takes"), ("\ud800", "half of a surrogate"),
    (r"(a|b)*a(a|b){13}", "16388 states, more than 8000")])
def test_what_is_no_expression_or_too_large_is_refused(regex, why):
    with pytest.raises(RequestError, match=r"^The regular expression .* cannot be used: ") as error:
        automaton_of(regex)
    assert why in str(error.value)


@pytest.mark.parametrize("regex", [r"(a|b)*a(a|b){40}", r".{0,500000}", r"(((a{1,99}){1,99}){1,99}){1,99}"])
def test_what_would_take_all_memory_or_time_is_stopped(regex, monkeypatch):
    monkeypatch.setattr(module, "MEMORY", 300 << 20)
    monkeypatch.setattr(module, "SECONDS", 1)
    with pytest.raises(RequestError, match=r"compiling it takes more than 1 s( or 315 MB)?\.$"):
        automaton_of(regex)


def test_tokens_that_do_too_many_things_are_refused(monkeypatch):
    monkeypatch.setattr("dmoe_export.grammar.steps.MOST_MAPS", 4000)
    words = ["".join(random.Random(i).choices("abc", k=6)) for i in range(60)]
    with pytest.raises(RequestError, match="states, and the tokens of this vocabulary do too many different things"):
        grammar_of(automaton_of("|".join(words)), [word.encode() for word in words])


def test_without_the_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(MissingRequirementError, match=r"need the library outlines-core; install it with: pip install"):
        automaton_of("a")


def test_where_the_library_does_not_run_it_says_so(monkeypatch):
    monkeypatch.setattr(module.sys, "executable", "/bin/false")
    with pytest.raises(MissingRequirementError, match="does not run here, in a process of its own"):
        automaton_of("a")


def test_grammars_are_compiled_once_and_the_last_few_kept(monkeypatch):
    made = []
    monkeypatch.setattr("dmoe_export.grammar.grammar.automaton_of", lambda regex: made.append(regex) or whole)
    whole = automaton_of("a*")
    grammars = Grammars(lambda: made.append("vocabulary") or Vocabulary([b"a", b"aa", b"a"]))
    first = grammars.of("a*", (1, 0))
    assert grammars.of("a*", (0, 1)) is first and made == ["vocabulary", "a*"]
    assert grammars.of("a*", ()) is not first  # other tokens may stand in it
    assert first.steps.allowed(first.steps.only([1]), first.steps.only([1])).tolist() == [False, False, True]
    monkeypatch.setattr("dmoe_export.grammar.grammar.MOST_KEPT", 3 * first.steps.nbytes)
    for i in range(3):
        grammars.of(f"a*{i}", ())
    assert grammars.of("a*", (1, 0)) is not first and len(grammars._kept) == 3


def test_an_answer_that_does_not_match_is_an_error():
    grammar = grammar_of(automaton_of("a+"), [b"a"])
    grammar.check("aa")
    with pytest.raises(CheckError, match=r"^The answer 'ab' was decoded to match and does not"):
        grammar.check("ab")


def test_what_is_remembered_is_bounded_and_forgetting_changes_nothing(monkeypatch):
    automaton, pieces = automaton_of("(ab|c){0,40}"), [b"a", b"b", b"c", b"ab", b"bc"]
    rng = np.random.default_rng(0)
    sets = [grammar_of(automaton, pieces).steps.only(rng.integers(1, automaton.states, 5)) for _ in range(30)]

    def ask(steps):
        return [(steps.after(one, 3), steps.before(one, 4), steps.after_any(one), steps.before_any(one),
                 steps.allowed(one, sets[0]).tolist()) for one in sets]

    wanted = ask(grammar_of(automaton, pieces).steps)
    monkeypatch.setattr("dmoe_export.grammar.steps._MOST_MEMORY", 2000)
    steps = grammar_of(automaton, pieces).steps
    assert ask(steps) == ask(steps) == wanted
    assert len(steps._memory) < 20 and len(steps._masks) < 20
