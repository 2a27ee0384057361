"""Small automata and vocabularies, and what their answers are by going through all of them."""

from __future__ import annotations

import itertools

import numpy as np

from dmoe_export.grammar.automaton import Automaton
from dmoe_export.grammar.canvas import MASKED
from dmoe_export.grammar.grammar import Grammar
from dmoe_export.grammar.steps import Steps
from dmoe_export.grammar.vocabulary import Trie, Vocabulary

LETTERS = b"abc"


def random_automaton(rng, states):
    """Over a, b and c; states from which nothing matches are the dead one. None where nothing matches at all."""
    table = rng.integers(0, states + 1, (states + 1, 4))
    table[rng.random(table.shape) < 0.3] = 0
    table[0], table[:, 0] = 0, 0
    accepting = rng.random(states + 1) < 0.3
    accepting[0] = False
    useful = accepting.copy()
    for _ in range(states):
        useful |= useful[table].any(axis=1)
    if not useful[1]:
        return None
    number = np.where(useful, np.cumsum(useful), 0)
    kept = np.append(0, np.flatnonzero(useful))
    classes = np.zeros(256, np.uint8)
    classes[list(LETTERS)] = 1, 2, 3
    return Automaton(number[table[kept]].astype(np.int16), classes, accepting[kept], int(number[1]))


def grammar_of(automaton, pieces, spaced=False):
    """As `Grammars.of` makes one."""
    vocabulary = Vocabulary(pieces, spaced)
    return Grammar(automaton, Steps(automaton.behind_a_space() if spaced else automaton, vocabulary, Trie(vocabulary)))


def is_answer(automaton, pieces, tokens, closed, ends, barred, spaced=False):
    """Whether these tokens, all places of an answer, match: as the words of canvas.py say, one after the other."""
    if set(tokens) & set(barred):
        return False
    first = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    if first < closed or not all(pieces[token] for token in tokens[:first]):
        return False
    text = b"".join(pieces[token] for token in tokens[:first])
    return automaton.matches(text[1:] if spaced and text[:1] == b" " else text)


def answers(count, tokens, good):
    """All fillings of the masked places with `count` tokens that are `good`."""
    choices = [range(count) if token == MASKED else [token] for token in tokens]
    return np.array([one for one in itertools.product(*choices) if good(one)], np.int64).reshape(-1, len(tokens))
