"""Which places of a text are masked together, and what each such set weighs in the bound on the text's likelihood.

The bound of LLaDA (arXiv 2502.09992, equation 6 and algorithm 3 of the appendix; `get_log_likelihood.py` of its code):
l uniform over 1 … L, l of the L places masked, of which none is preferred, (L / l) · Σ log p of the masked tokens. Its
mean is a lower bound on the log-likelihood: the mean over all orders in which the tokens could be filled in one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

import numpy as np
from numpy.typing import NDArray

from ..runtime.backend import Bools

Weights = NDArray[np.float64]


@dataclass(frozen=True)
class MaskSets:
    """Sets of masked places; the first has all of them. An estimate is Σ weight · Σ log p of a set's tokens."""

    masked: Bools  # [S, L]
    weights: Weights  # [S]; 0 where a set is computed, but is no part of the estimate
    drawn: int = 0  # so many of them, the last, are drawn; 0: there is no chance in it

    def estimate(self, values: Weights) -> tuple[float, float]:
        """Of Σ log p of every set [S]: the estimate and its variance, 0 where nothing or but one is drawn.

        The variance is that of sets drawn one by one. With sizes spread evenly, the true one is usually less.
        """
        counted = self.weights > 0  # −inf · 0 is no number
        terms = self.weights[counted] * values[counted]
        if self.drawn < 2 or not np.isfinite(terms).all():
            return float(terms.sum()), 0.0
        return float(terms.sum()), float(terms.var(ddof=1)) * self.drawn


def all_at_once(places: int) -> MaskSets:
    """Every place masked: one forward says all."""
    return MaskSets(np.ones((1, places), bool), np.ones(1))


def mask_sets(places: int, samples: int, seed: int, block: int) -> MaskSets:
    """Of L places: all 2^L − 1 sets with their exact weights where `samples` are as many, else so many drawn ones.

    Drawn sets are a function of these four numbers alone (Philox counts, see noise.py): nobody's neighbours matter, and
    texts of one length are compared under the same sets. Sizes l are spread evenly over 1 … L from a random first one.
    """
    if places < 63 and 2**places - 1 <= samples:
        return _every_set(places)
    first = (_raw(seed, block, 0, 1)[0] >> np.uint64(32)) * np.uint64(places) >> np.uint64(32)
    sizes = (int(first) + np.arange(samples) * places // samples) % places + 1
    masked = np.zeros((1 + samples, places), bool)
    masked[0] = True
    for i, size in enumerate(sizes.tolist(), 1):
        masked[i, np.argsort(_raw(seed, block, i, places), kind="stable")[:size]] = True
    return MaskSets(masked, np.append(0.0, places / sizes / samples), samples)


def _every_set(places: int) -> MaskSets:
    numbers = np.arange(2**places - 1, 0, -1)
    masked = (numbers[:, None] >> np.arange(places) & 1).astype(bool)
    sizes = masked.sum(axis=1)
    return MaskSets(masked, np.array([1 / (size * comb(places, size)) for size in sizes.tolist()]))


def _raw(seed: int, block: int, number: int, count: int) -> NDArray[np.uint64]:
    return np.random.Philox(key=seed % 2**128, counter=[0, 0, number, block]).random_raw(count)
