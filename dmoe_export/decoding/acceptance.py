"""Acceptance policies: which masked positions of a block keep their chosen token after a denoise step.

Each takes the confidences of the masked positions [m] and the number the schedule asks for, and returns a mask [m]
with at least one position, so that every step makes progress. Ties: lower position first.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ..runtime.backend import Bools, Floats
from .settings import DecodeSettings


class Acceptance(Protocol):
    """Confidences [m], scheduled count → accepted [m] bool."""

    def __call__(self, confidence: Floats, scheduled: int) -> Bools:
        """Choose."""
        ...


def schedule(block_length: int, steps: int) -> list[int]:
    """Positions to take per step: n // steps, one more in the first n % steps steps (LLaDA2 reference)."""
    base, extra = divmod(block_length, steps)
    return [base + (step < extra) for step in range(steps)]


def _best(confidence: Floats, count: int) -> Bools:
    accepted = np.zeros(len(confidence), bool)
    accepted[np.argsort(-confidence, kind="stable")[:max(1, count)]] = True
    return accepted


def fixed(confidence: Floats, scheduled: int) -> Bools:
    """Exactly the schedule's number of best positions."""
    return _best(confidence, scheduled)


def threshold(confidence: Floats, scheduled: int, limit: float) -> Bools:
    """All above `limit` (strictly, as LLaDA2), or the schedule's number of best ones when those are fewer."""
    accepted = confidence > limit
    return accepted if accepted.sum() >= max(1, scheduled) else _best(confidence, scheduled)


def factor(confidence: Floats, scheduled: int, f: float) -> Bools:
    """Longest prefix by confidence in which rank r (1 = best) has confidence ≥ 1 − f/(r+1); rank 1 always.

    Source: Fast-dLLM (arXiv 2505.22618), factor-based parallel decoding; the schedule plays no part.
    """
    order = np.argsort(-confidence, kind="stable")
    ranks = np.arange(1, len(confidence) + 1)
    passes = confidence[order] >= 1 - f / (ranks + 1)
    passes[0] = True
    count = len(passes) if passes.all() else int(np.argmin(passes))
    return _best(confidence, count)


def policy(settings: DecodeSettings) -> Acceptance:
    """The policy a request asks for."""
    if settings.acceptance == "fixed":
        return fixed
    if settings.acceptance == "factor":
        return lambda confidence, scheduled: factor(confidence, scheduled, settings.factor)
    return lambda confidence, scheduled: threshold(confidence, scheduled, settings.threshold)
