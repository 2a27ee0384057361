"""What of an answer was sent, so that a repeat of it goes on where the first one ended."""

from __future__ import annotations

from collections import defaultdict

from ..asked import Piece


class DiffersError(Exception):
    """The repeat of an answer is another one."""


class Replay:
    """Compares a repeat's pieces with those that were sent, choice by choice; what choices had between them is free."""

    def __init__(self) -> None:
        self._sent = defaultdict[int, list[tuple[object, ...]]](list)  # by choice
        self._seen = defaultdict[int, int](int)  # pieces of this repeat, by choice

    def again(self) -> None:
        """A repeat begins."""
        self._seen.clear()

    def is_new(self, piece: Piece) -> bool:
        """Whether it was not sent yet; from now on it was. Raises DiffersError where another was sent in its place."""
        sent, place = self._sent[piece.choice], self._seen[piece.choice]
        self._seen[piece.choice] += 1
        mark = (tuple(piece.token_ids), piece.text, piece.finish_reason)
        if place == len(sent):
            sent.append(mark)
            return True
        if sent[place] != mark:
            raise DiffersError
        return False

    @property
    def caught_up(self) -> bool:
        """Whether all that was sent has come again."""
        return all(self._seen[choice] >= len(sent) for choice, sent in self._sent.items())
