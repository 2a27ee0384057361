"""Regular expressions compiled for a tokenizer, the last few of them kept."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from ..errors import CheckError
from .automaton import Automaton, automaton_of
from .steps import Steps
from .vocabulary import Trie, Vocabulary

MOST_KEPT = 256 << 20  # bytes of all grammars of a tokenizer, with what each may remember


@dataclass(frozen=True)
class Grammar:
    """What an answer must match. `lock`: whoever asks `steps`, which remembers, holds it."""

    automaton: Automaton
    steps: Steps
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def check(self, text: str) -> None:
        """Raise CheckError for the text of a whole answer that does not match: a mistake of ours, never an answer."""
        if not self.automaton.matches(text.encode("utf-8")):
            raise CheckError(f"The answer {text[:100]!r} was decoded to match and does not; please report this, with "
                             "the bundle's tokenizer.json and the regular expression or schema.")


class Grammars:
    """Of one tokenizer. Threads may share it."""

    def __init__(self, vocabulary: Callable[[], Vocabulary]) -> None:
        """`vocabulary` is asked for once, when something is compiled first."""
        self._make, self._lock = vocabulary, threading.Lock()
        self._kept: OrderedDict[tuple[str, tuple[int, ...]], Grammar] = OrderedDict()

    @cached_property
    def _vocabulary(self) -> tuple[Vocabulary, Trie]:
        vocabulary = self._make()
        return vocabulary, Trie(vocabulary)

    def of(self, regex: str, barred: Sequence[int]) -> Grammar:
        """The grammar of a regular expression; `barred` tokens have no place in a match.

        Raises RequestError for what cannot be compiled, MissingRequirementError where the library is missing.
        """
        key = regex, tuple(sorted(barred))
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            whole, trie = self._vocabulary
        automaton, vocabulary = automaton_of(regex), whole.without(barred)
        grammar = Grammar(automaton, Steps(automaton.behind_a_space() if vocabulary.spaced else automaton, vocabulary,
                                           trie))
        with self._lock:
            self._kept[key] = grammar
            while len(self._kept) > 1 and sum(one.steps.nbytes for one in self._kept.values()) > MOST_KEPT:
                self._kept.popitem(last=False)
        return grammar
