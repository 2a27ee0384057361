"""Which tokens may stand where: a canvas of known and masked places is good iff some filling of its masks matches.

`F[i]` are the states that the places before i can reach from the start, `B[i]` those from which the places from i on
can reach an end. A token t may stand at place i iff some state of F[i] leads by t to one of B[i + 1]: what is before i
and what is behind it share nothing but that state, so then, and only then, a whole filling has t at i. After a token is
taken, F behind it and B before it follow; so tokens taken one after the other are good together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .automaton import Bools
from .steps import States, Steps

MASKED = -1


class Rule:
    """What holds for all places of an answer before anything is decoded."""

    def __init__(self, steps: Steps, given: Sequence[int], closed: int, ends: Sequence[int], barred: Sequence[int]
                 ) -> None:
        """`given`: tokens of the answer's places, MASKED where the model fills in; no place below `closed` ends it.

        `ends`: tokens that end an answer, behind which any token may stand but the `barred`, which never do.
        """
        self.steps, self.given, self.closed = steps, given, closed
        self.ends, self.barred = frozenset(ends), frozenset(barred)
        automaton = steps.automaton
        self._accepting = np.append(automaton.accepting, False)
        self._done = steps.only([steps.done])
        complete = _with(steps.only(np.flatnonzero(automaton.accepting)), True)
        self._rest = self._back(complete)
        self.fits = self.good
        """Whether some answer of this length matches; else `rest` is of those that begin a match."""
        if not self.fits and closed == 0:
            self._rest = self._back(self._useful(complete))

    @property
    def good(self) -> bool:
        """Whether there is any answer."""
        return bool(self.rest(0)[self.steps.automaton.start])

    def rest(self, place: int) -> States:
        """The states from which the answer's places from this one on can reach an end."""
        packed = np.frombuffer(self._rest[min(place, len(self.given))], np.uint8)
        return np.unpackbits(packed, count=self.steps.done + 1).tobytes()

    def behind(self, tokens: Sequence[int]) -> States:
        """The state behind the answer's first tokens, of which none is MASKED."""
        ended = not self.ends.isdisjoint(tokens)
        return self._done if ended else self.steps.only([self.steps.follow(tokens)])

    def after(self, place: int, states: States, token: int) -> States:
        """The states behind a place; `token` may be MASKED. Places behind the answer's last change nothing."""
        if place >= len(self.given):
            return states
        done = bool(states[-1])
        if token == MASKED:
            return _with(self.steps.after_any(states), done or self._may_end(place, states))
        if token in self.ends:
            return self._done if done or self._may_end(place, states) else bytes(len(states))
        return _with(self.steps.after(states, token), done)

    def before(self, place: int, states: States, token: int) -> States:
        """The states before a place from which those behind it are reached; `token` may be MASKED."""
        if place >= len(self.given):
            return states
        done = bool(states[-1])
        if token in self.ends:
            reached = bytes(len(states))
        else:
            reached = self.steps.before_any(states) if token == MASKED else self.steps.before(states, token)
        ends = done and place >= self.closed and (token in self.ends or (token == MASKED and bool(self.ends)))
        if ends:
            reached = (np.frombuffer(reached, bool) | self._accepting).tobytes()
        return _with(reached, done)

    def allows(self, place: int, states: States, token: int, wanted: States) -> bool:
        """Whether a token leads from `states` into `wanted`."""
        if token in self.barred or token < 0:
            return False
        return place >= len(self.given) or _meet(self.after(place, states, token), wanted)

    def allowed(self, place: int, states: States, wanted: States) -> Bools:
        """The tokens [V] that do."""
        allowed = self.steps.allowed(states, wanted)
        if place >= len(self.given):
            allowed[:] = True
        elif wanted[-1]:
            if states[-1]:
                allowed[:] = True
            elif self._may_end(place, states):
                allowed[list(self.ends)] = True
        allowed[list(self.barred)] = False
        return allowed

    def _may_end(self, place: int, states: States) -> bool:
        return place >= self.closed and bool(self.ends) and _meet(states, self._accepting)

    def _back(self, last: States) -> list[bytes]:
        """`rest` in bits: of long answers and large automata it is long, and it lives as long as the request."""
        rest, packed = last, [_packed(last)]
        for place in reversed(range(len(self.given))):
            before = self.before(place, rest, self.given[place])
            packed.append(packed[-1] if before == rest else _packed(before))
            rest = before
        return packed[::-1]

    def _useful(self, complete: States) -> States:
        """States from which some tokens, however many, make a match."""
        while (more := (np.frombuffer(complete, bool) | np.frombuffer(self.steps.before_any(complete), bool)).tobytes()
               ) != complete:
            complete = more
        return _with(complete, False)


class Canvas:
    """Places first … first + n − 1 of an answer; those before are known, those behind are as given."""

    def __init__(self, rule: Rule, before: Sequence[int], tokens: Sequence[int]) -> None:
        """`before`: all tokens of the answer before these; `tokens` [n], MASKED where one is wanted."""
        self._rule, self.first, self._tokens = rule, len(before), list(tokens)
        n = len(self._tokens)
        self._reached = [rule.behind(before)] * (n + 1)  # F
        self._wanted = [rule.rest(self.first + n)] * (n + 1)  # B
        self._forward(0, True)
        self._backward(n - 1, True)

    @property
    def good(self) -> bool:
        """Whether some filling of the masked places matches."""
        return _meet(self._reached[0], self._wanted[0])

    def allows(self, place: int, token: int) -> bool:
        """Whether a token may stand at place `first` + `place`, all else as it is."""
        return self._rule.allows(self.first + place, self._reached[place], token, self._wanted[place + 1])

    def allowed(self, place: int) -> Bools:
        """The tokens [V] that may; there is one as long as the canvas is good."""
        return self._rule.allowed(self.first + place, self._reached[place], self._wanted[place + 1])

    def take(self, place: int, token: int) -> None:
        """A masked place takes a token that it allows."""
        self._tokens[place] = token
        self._forward(place)
        self._backward(place)

    def _forward(self, place: int, all_: bool = False) -> None:
        for i in range(place, len(self._tokens)):
            after = self._rule.after(self.first + i, self._reached[i], self._tokens[i])
            if after == self._reached[i + 1] and not all_:
                return
            self._reached[i + 1] = after

    def _backward(self, place: int, all_: bool = False) -> None:
        for i in range(place, -1, -1):
            before = self._rule.before(self.first + i, self._wanted[i + 1], self._tokens[i])
            if before == self._wanted[i] and not all_:
                return
            self._wanted[i] = before


def _packed(states: States) -> bytes:
    return np.packbits(np.frombuffer(states, bool)).tobytes()


def _with(states: States, done: bool) -> States:
    """The set with, or without, the end."""
    return states if bool(states[-1]) == done else states[:-1] + (b"\1" if done else b"\0")


def _meet(states: States, others: States | Bools) -> bool:
    other = np.frombuffer(others, bool) if isinstance(others, bytes) else others
    return bool((np.frombuffer(states, bool) & other).any())
