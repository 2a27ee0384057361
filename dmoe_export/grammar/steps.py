"""What tokens do to sets of an automaton's states: forwards, backwards, and which lead from one set into another.

A token is a map of all states to states, and most tokens of a vocabulary are the same map ("any letters inside a
string"). So an automaton over maps walks the trie of all tokens once, and what is left are K maps and one number for
each token; of 157 184 tokens some hundreds or thousands. A set is a `bytes` of S + 1 truth values; the last, `done`,
stands for "the answer has ended", which no token of a match leads to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import RequestError
from .automaton import DEAD, Automaton, Bools
from .vocabulary import Trie, Vocabulary

States = bytes

MOST_MAPS = 128 << 20  # bytes of all maps
_TOGETHER = 1 << 20  # pairs of maps and states that are looked at together
_MOST_MEMORY = 8 << 20  # bytes of sets that are remembered, and of masks


class Steps:
    """The tokens of a vocabulary as steps of an automaton. What was asked is remembered, within bounds."""

    def __init__(self, automaton: Automaton, vocabulary: Vocabulary, trie: Trie) -> None:
        """`trie`: of the vocabulary, which may have lost tokens since. Raises RequestError beyond `MOST_MAPS`."""
        self.automaton, self.done = automaton, automaton.states
        self._maps, self._map_of = _maps(automaton, vocabulary, trie)
        self._source, self._target = self._edges()
        self._memory: dict[Any, Any] = {}
        self._masks: dict[tuple[States, States], Bools] = {}
        self._used = 0

    @property
    def maps(self) -> int:
        """How many different maps the tokens are."""
        return len(self._maps) - 1

    @property
    def nbytes(self) -> int:
        """Of memory, with all that may be remembered."""
        return self._maps.nbytes + self._map_of.nbytes + 2 * self._source.nbytes + 2 * _MOST_MEMORY

    def only(self, states: Any) -> States:
        """The set of these states, given as indices."""
        chosen = np.zeros(self.done + 1, bool)
        chosen[states] = True
        chosen[DEAD] = False
        return chosen.tobytes()

    def follow(self, tokens: Sequence[int]) -> int:
        """The state that tokens lead to from the start."""
        state = self.automaton.start
        for one in self._map_of[list(tokens)].tolist():
            state = int(self._maps[one, state])
        return state

    def after(self, states: States, token: int) -> States:
        """Where a token leads from these states."""
        one = int(self._map_of[token])
        return self._once((states, one), lambda: self.only(self._maps[one, np.frombuffer(states, bool)[:-1]]))

    def before(self, states: States, token: int) -> States:
        """From where a token leads into these states."""
        one = int(self._map_of[token])
        return self._once((one, states), lambda: self.only(
            np.flatnonzero(np.frombuffer(states, bool)[self._maps[one]])))

    def after_any(self, states: States) -> States:
        """Where tokens lead from these states."""
        return self._once((states, "any"), lambda: self._along(states, self._source, self._target))

    def before_any(self, states: States) -> States:
        """From where some token leads into these states."""
        return self._once(("any", states), lambda: self._along(states, self._target, self._source))

    def allowed(self, states: States, wanted: States) -> Bools:
        """The tokens [V] that lead from one of `states` into one of `wanted`."""
        key = states, wanted
        leads = self._masks.get(key)
        if leads is None:
            if len(self._masks) * (len(self._maps) + 2 * self.done + 200) > _MOST_MEMORY:
                self._masks.clear()
            target = np.frombuffer(wanted, bool)
            leads = np.zeros(len(self._maps), bool)
            now = np.flatnonzero(np.frombuffer(states, bool)[:-1])
            for part in np.array_split(now, 1 + len(now) * len(self._maps) // _TOGETHER):
                leads |= target[self._maps[:, part]].any(axis=1)
            self._masks[key] = leads
        return leads[self._map_of]

    def _along(self, states: States, source: NDArray[Any], target: NDArray[Any]) -> States:
        return self.only(target[np.frombuffer(states, bool)[source]])

    def _once(self, key: Any, compute: Callable[[], States]) -> States:
        found: States | None = self._memory.get(key)
        if found is None:
            if self._used > _MOST_MEMORY:
                self._memory.clear()
                self._used = 0
            found = compute()
            found = self._memory.setdefault(found, found)  # equal sets are one object, whose hash is known
            self._memory[key] = found
            self._used += 2 * self.done + 200
        return found

    def _edges(self) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
        """Pairs of states that some token joins."""
        joined = np.zeros((self.done, self.done), bool)
        states = np.arange(self.done)
        for one in self._maps:
            joined[states, one] = True
        joined[:, DEAD] = False
        source, target = np.nonzero(joined)
        return source.astype(np.int16), target.astype(np.int16)


def _maps(automaton: Automaton, vocabulary: Vocabulary, trie: Trie) -> tuple[NDArray[np.int16], NDArray[np.int32]]:
    """The maps [K, S] of all tokens, the first to `DEAD`, and which is each token's [V]."""
    table, classes = automaton.table, automaton.classes
    dead, same = np.zeros(automaton.states, np.int16), np.arange(automaton.states, dtype=np.int16)
    maps, numbers = [dead, same], {dead.tobytes(): 0, same.tobytes(): 1}
    after = np.full((64, table.shape[1]), -1, np.int32)  # of a map and a class of bytes
    after[0] = 0
    map_of = np.zeros(len(vocabulary.pieces), np.int32)
    now = np.ones(1, np.int64)  # of the nodes of a level
    for (parents, data), (tokens, last) in zip(trie.levels, trie.ends, strict=True):
        before, one = now[parents], classes[data]
        now = after[before, one].astype(np.int64)
        new = np.flatnonzero(now < 0)
        if len(new):
            for pair in np.unique(before[new] * table.shape[1] + one[new]).tolist():
                number, byte = divmod(pair, table.shape[1])
                found = table[maps[number], byte]
                there = numbers.setdefault(found.tobytes(), len(maps))
                if there == len(maps):
                    maps.append(found)
                    if 4 * there * automaton.states > MOST_MAPS:
                        raise RequestError(f"The regular expression or schema has {automaton.states - 1} states, and "
                                           "the tokens of this vocabulary do too many different things to them; "
                                           "shorten its lists of values and its counted repetitions.")
                    if there == len(after):
                        after = np.vstack([after, np.full_like(after, -1)])
                after[number, byte] = there
            now = after[before, one].astype(np.int64)
        map_of[tokens] = now[last]
    map_of[[not piece for piece in vocabulary.pieces]] = 0
    used, numbered = np.unique(np.append(0, map_of), return_inverse=True)
    return np.stack([maps[i] for i in used.tolist()]), numbered.reshape(-1)[1:].astype(np.int32)
