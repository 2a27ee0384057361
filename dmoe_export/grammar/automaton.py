"""A regular expression as a table over bytes: which state each byte leads to, and from which states no match follows.

The library outlines-core makes it, of the tokens that are single bytes, in a process of its own: what a short
expression comes to can be beyond all memory (`(a|b)*a(a|b){30}`), and the library has no limit for it.

The library's automaton is of the first match, not of all: it leaves out what may follow a match, if that is none again
at once (of `aé?` the é, of ` a*| b` the b). So it is asked for the expression and one more letter, which ends a match
and which no text has: what leads by that letter to a match is what accepts.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import MissingRequirementError, RequestError
from ..extras import pip_install
from ..words import size, visible

_END = "\U0010ffff"  # a noncharacter, for the inside of programs (Unicode, chapter 23.7)
MOST_STATES = 8000
MEMORY = 1 << 30  # bytes of the process that compiles
SECONDS = 5

Bools = NDArray[np.bool_]
DEAD = 0


@dataclass(frozen=True)
class Automaton:
    """Deterministic, over bytes; the whole of a text must match. From every state but `DEAD` a match can be reached."""

    table: NDArray[np.int16]  # [S, C] state and class of byte → next state; row DEAD and column 0 are DEAD
    classes: NDArray[np.uint8]  # [256] class of each byte; bytes of one class lead the same way from every state
    accepting: Bools  # [S]
    start: int

    @property
    def states(self) -> int:
        """How many there are, the dead one among them."""
        return len(self.table)

    def run(self, data: bytes, state: int | None = None) -> int:
        """The state after these bytes, from the start or from `state`."""
        state = self.start if state is None else state
        for one in self.classes[np.frombuffer(data, np.uint8)].tolist():
            state = int(self.table[state, one])
        return state

    def matches(self, data: bytes) -> bool:
        """Whether the whole of it matches."""
        return bool(self.accepting[self.run(data)])

    def behind_a_space(self) -> Automaton:
        """Of texts which lose one leading space before they are matched: with it, or without where there is none."""
        table = np.vstack([self.table, self.table[self.start:self.start + 1]])
        space = self.classes[ord(" ")]
        others = np.flatnonzero(self.classes == space)
        classes = self.classes.copy()
        if space == 0 or len(others) > 1:  # the space becomes a class of its own
            table = np.hstack([table, table[:, space:space + 1]])
            space = classes[ord(" ")] = table.shape[1] - 1
        table[-1, space] = self.start
        return Automaton(table, classes, np.append(self.accepting, self.accepting[self.start]), len(table) - 1)


def automaton_of(regex: str) -> Automaton:
    """The automaton of a regular expression (syntax of Rust's crate regex, without look-around and anchors).

    Raises RequestError for what is none, matches nothing or is too large, MissingRequirementError without the library.
    """
    if find_spec("outlines_core") is None:
        raise MissingRequirementError("Answers that match a regular expression or a JSON schema need the library "
                                      f"outlines-core; install it with: {pip_install('structured')}.")
    try:
        done = subprocess.run([sys.executable, str(Path(__file__).with_name("child.py")), str(MOST_STATES),
                               str(MEMORY), str(SECONDS), _END], input=regex.encode("utf-8"), capture_output=True,
                              timeout=2 * SECONDS)
    except UnicodeEncodeError:
        raise _refused(regex, "it holds half of a surrogate pair, which is no letter") from None
    except subprocess.TimeoutExpired:
        raise _refused(regex, f"compiling it takes more than {SECONDS} s") from None
    head, _, body = done.stdout.partition(b"\n")
    if done.returncode < 0 or b"MemoryError" in done.stderr:  # a signal: one of the two limits
        raise _refused(regex, f"compiling it takes more than {SECONDS} s or {size(MEMORY)}")
    if done.returncode or not head:
        raise MissingRequirementError("The library outlines-core does not run here, in a process of its own: "
                                      f"{done.stderr.decode(errors='replace').strip()[-300:]}")
    said = json.loads(head)
    if "error" in said:
        raise _refused(regex, "it is no expression that outlines-core takes, which knows no look-around, back "
                              "references and anchors, as the whole answer is matched (" +
                              visible(" ".join(said["error"].split()))[:200] + ")")
    if "states" in said:
        raise _refused(regex, f"it has {said['states']} states, more than {MOST_STATES}")
    return _table(regex, said, np.frombuffer(body, np.int32, said["numbers"]).reshape(-1, 3))


def _table(regex: str, said: dict[str, Any], edges: NDArray[np.int32]) -> Automaton:
    names, numbers = np.unique(np.concatenate([edges[:, 0], edges[:, 2], [said["start"]]]), return_inverse=True)
    source, target, byte = numbers[:len(edges)] + 1, numbers[len(edges):-1] + 1, edges[:, 1]
    table = np.zeros((len(names) + 1, 256), np.int16)
    table[source, byte] = target
    accepting = np.arange(len(table))
    for one in _END.encode("utf-8"):
        accepting = table[accepting, one]
    accepts = np.append(False, np.isin(names, said["accepting"]))[accepting]
    useful = _closure(accepts, target, source)
    start = int(numbers[-1]) + 1
    if not useful[start]:
        raise _refused(regex, "it matches no text")
    useful[DEAD] = True
    table = np.where(useful, useful.cumsum() - 1, DEAD).astype(np.int16)[table[useful]]
    # One column more, of no byte: columns are sorted, so the first is all dead.
    columns, classes = np.unique(np.hstack([np.zeros((len(table), 1), np.int16), table]), axis=1, return_inverse=True)
    return Automaton(np.ascontiguousarray(columns), classes.reshape(-1)[1:].astype(np.uint8), accepts[useful],
                     int(useful[:start].sum()))


def _closure(found: Bools, source: NDArray[Any], target: NDArray[Any]) -> Bools:
    """What can be reached from `found` along the edges."""
    count, found = len(found), found.copy()
    edges = np.unique(source.astype(np.int64) * count + target)
    first, after = np.searchsorted(edges, np.arange(count + 1) * count).tolist(), (edges % count).tolist()
    waiting = np.flatnonzero(found).tolist()
    while waiting:
        one = waiting.pop()
        for other in after[first[one]:first[one + 1]]:
            if not found[other]:
                found[other] = True
                waiting.append(other)
    return found


def _refused(regex: str, why: str) -> RequestError:
    return RequestError(f"The regular expression {regex[:60]!r} cannot be used: {why}.")
