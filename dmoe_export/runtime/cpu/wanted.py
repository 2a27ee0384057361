"""The vocabulary's head for wanted tokens alone: rows of a batch want different numbers of them, and padding costs.

The graph takes token b·T + logit_rows[b, m] of all B·T tokens, so a place may name a token of its own row or of any
later one. Wanted tokens therefore move up into free places of earlier rows, and M shrinks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backend import Bools, Ints


class Wanted:
    """`logit_rows` [B, M] of a forward of T tokens as the graph gets them, [B, M'] with M' ≤ M, and the way back."""

    def __init__(self, logit_rows: Ints, tokens: int, stay: bool = False) -> None:
        """`stay`: nothing moves, as what a row wants is computed with numbers of its own (a canvas's temperature)."""
        self._given: Bools = logit_rows >= 0
        rows, wide = logit_rows.shape
        up_to = self._given.sum(axis=1).cumsum()  # wanted tokens of the first 1, 2, … rows
        # Place k is in row k // M'. It may not name a token of an earlier row, so the first b rows want at most b·M'.
        narrow = max(1, int((-(-up_to // np.arange(1, rows + 1))).max()))
        self.logit_rows, self._packed = logit_rows, narrow < wide and not stay
        if self._packed:
            tokens_of_all = (logit_rows + tokens * np.arange(rows)[:, None])[self._given]
            packed = np.full(rows * narrow, -1, np.int64)
            packed[:len(tokens_of_all)] = tokens_of_all - tokens * (np.arange(len(tokens_of_all)) // narrow)
            self.logit_rows = packed.reshape(rows, narrow)

    def spread(self, results: NDArray[Any]) -> NDArray[Any]:
        """Results [B, M', …] of the graph at the places [B, M, …] that were given; zeros where nothing is wanted."""
        if not self._packed:
            return results
        spread = np.zeros((*self._given.shape, *results.shape[2:]), results.dtype)
        spread[self._given] = results.reshape(-1, *results.shape[2:])[:int(self._given.sum())]
        return spread
