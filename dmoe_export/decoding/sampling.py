"""Choosing tokens from logits with temperature, top-k and top-p."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.backend import Ints
from .settings import DecodeSettings

Reals = NDArray[np.floating[Any]]


def without(logits: Reals, mask_id: int) -> Reals:
    """Logits [m, V] in float64 in which the mask token cannot be chosen."""
    allowed = logits.astype(np.float64)
    allowed[:, mask_id] = -np.inf
    return allowed


def greedy(logits: Reals) -> tuple[Ints, Reals]:
    """Best tokens [m] and their probabilities [m] from logits [m, V]; ties: lower id first."""
    tokens = logits.argmax(axis=-1)
    return tokens, _probabilities(logits, tokens)


def sample(logits: Reals, settings: DecodeSettings, rng: np.random.Generator) -> tuple[Ints, Reals]:
    """Drawn tokens [m] and confidences [m] from logits [m, V].

    The confidence is the model's own probability of the drawn token (temperature 1, no filter): filters must not make a
    guess look certain.
    """
    drawn = np.array([_draw(row, settings, u) for row, u in zip(logits, rng.random(len(logits)), strict=True)],
                     dtype=np.int64)
    return drawn, _probabilities(logits, drawn)


def _probabilities(logits: Reals, tokens: Ints) -> Reals:
    return _softmax(logits)[np.arange(len(tokens)), tokens].astype(np.float32)


def _softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def _draw(logits: np.ndarray, settings: DecodeSettings, u: float) -> int:
    """Inverse-CDF draw, best token first, so that one uniform number decides."""
    order = np.argsort(-logits, kind="stable")
    if settings.top_k:
        order = order[:settings.top_k]
    probs = _softmax(logits[order] / settings.temperature)
    cumulative = probs.cumsum()
    if settings.top_p < 1:
        keep = int(np.searchsorted(cumulative, settings.top_p)) + 1  # the one that crosses stays
        cumulative = cumulative[:keep]
    return int(order[min(int(np.searchsorted(cumulative, u * cumulative[-1], side="right")), len(cumulative) - 1)])
