"""Acceptance policies: which masked positions of a block keep their chosen token after a denoise step; and editing.

Each takes the confidences of the masked positions [m], their places in the block [m] (ascending) and the number the
schedule asks for, as far as it needs them, and returns a mask [m] with at least one position, so that every step makes
progress. Ties: lower position first.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ..runtime.backend import Bools, Ints
from .sampling import Reals
from .settings import DecodeSettings

Credits = dict[int, dict[int, float]]  # place in the block → token → credit


class Acceptance(Protocol):
    """Confidences [m], places [m], scheduled count → accepted [m] bool."""

    def __call__(self, confidence: Reals, places: Ints, scheduled: int) -> Bools:
        """Choose."""
        ...


def scheduled(block_length: int, steps: int, step: int) -> int:
    """Positions to take in a step: n // steps, one more in the first n % steps steps (LLaDA2 reference)."""
    base, extra = divmod(block_length, steps)
    return base + (step < extra)


def _best(confidence: Reals, count: int) -> Bools:
    accepted = np.zeros(len(confidence), bool)
    accepted[np.argsort(-confidence, kind="stable")[:max(1, count)]] = True
    return accepted


def fixed(confidence: Reals, scheduled: int) -> Bools:
    """Exactly the schedule's number of best positions."""
    return _best(confidence, scheduled)


def threshold(confidence: Reals, scheduled: int, limit: float) -> Bools:
    """All above `limit` (strictly, as LLaDA2), or the schedule's number of best ones when those are fewer.

    Fast-dLLM takes ≥; its recorded runs come out the same, token for token.
    """
    accepted = confidence > limit
    return accepted if accepted.sum() >= max(1, scheduled) else _best(confidence, scheduled)


def factor(confidence: Reals, scheduled: int, f: float) -> Bools:
    """Longest prefix by confidence in which rank r (1 = best) has confidence ≥ 1 − f/(r+1); rank 1 always.

    Source: Fast-dLLM (arXiv 2505.22618), factor-based parallel decoding; the schedule plays no part.
    """
    order = np.argsort(-confidence, kind="stable")
    ranks = np.arange(1, len(confidence) + 1)
    passes = confidence[order] >= 1 - f / (ranks + 1)
    passes[0] = True
    count = len(passes) if passes.all() else int(np.argmin(passes))
    return _best(confidence, count)


def hierarchy(confidence: Reals, places: Ints, low: float, limit: float) -> Bools:
    """In every run of masks the best if above `low`, all above `limit`, and the best of all.

    Decoding runs from their insides keeps tokens chosen at once apart. Source: dInfer (arXiv 2510.08666), hierarchical
    decoding, `HierarchyDecoder` of its code; the schedule plays no part.
    """
    accepted = (confidence > limit) | _best(confidence, 1)
    for run in np.split(np.arange(len(places)), np.flatnonzero(np.diff(places) > 1) + 1):
        best = run[np.argmax(confidence[run])]
        accepted[best] |= confidence[best] > low
    return accepted


def credit(logits: Reals, places: Ints, held: Credits, alpha: float, beta: float, gamma: float
           ) -> tuple[Reals, Credits]:
    """Logits [m, V] raised for tokens that were the best choice before, and the credits after this step.

    Per place: every credit decays by β, the best token of the plain logits gains p^γ, and a token of credit c gets
    α·ln(1 + c) more. Source: CreditDecoding (arXiv 2510.06133), as in dInfer's `CreditThresholdParallelDecoder`.
    """
    raised = logits.astype(np.float64)
    after: Credits = {}
    top = raised.argmax(axis=-1)
    probability = 1 / np.exp(raised - raised.max(axis=-1, keepdims=True)).sum(axis=-1)
    for i, place in enumerate(places.tolist()):
        mine = {token: beta * value for token, value in held.get(place, {}).items()}
        mine[int(top[i])] = mine.get(int(top[i]), 0.0) + float(probability[i]) ** gamma
        raised[i, list(mine)] += alpha * np.log1p(list(mine.values()))
        after[place] = mine
    return raised, after


def edits(best: Ints, confidence: Reals, current: Ints, limit: float) -> Bools:
    """Decoded positions [e] to overwrite: another token is the best there, with a probability above `limit`.

    Source: LLaDA2.1 (arXiv 2602.08676), token-to-token editing; SGLang's `JointThreshold` with `edit_threshold`.
    """
    return (best != current) & (confidence > limit)


def policy(settings: DecodeSettings) -> Acceptance:
    """The policy a request asks for."""
    s = settings
    if s.acceptance == "fixed":
        return lambda confidence, places, scheduled: fixed(confidence, scheduled)
    if s.acceptance == "factor":
        return lambda confidence, places, scheduled: factor(confidence, scheduled, s.factor)
    if s.acceptance == "hierarchy":
        return lambda confidence, places, scheduled: hierarchy(confidence, places, s.low_threshold, s.threshold)
    # `credit` is `threshold` over the raised logits.
    return lambda confidence, places, scheduled: threshold(confidence, scheduled, s.threshold)
