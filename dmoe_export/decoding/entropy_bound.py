"""Which places of a canvas keep the token drawn for them: the entropy bound."""

from __future__ import annotations

import numpy as np

from ..runtime.backend import Bools
from .sampling import Reals


def entropy_bound(entropy: Reals, bound: float) -> Bools:
    """Places [C] by rising entropy, in nats, while those before sum to at most `bound`; the first always.

    That sum bounds what the accepted tokens say about each other, so drawing them at once is nearly drawing them in
    turn. Ties: lower place first. Source: EB-Sampler (arXiv 2505.24857); `EntropyBoundSampler` of transformers 5.24.
    """
    order = np.argsort(entropy, kind="stable")
    rising = entropy[order].astype(np.float64)
    before = np.concatenate([[0.0], rising.cumsum()[:-1]])
    accepted = np.zeros(len(entropy), bool)
    accepted[order[before <= bound]] = True
    return accepted
