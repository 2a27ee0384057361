"""Choosing tokens from logits with temperature, top-k and top-p."""

from __future__ import annotations

import numpy as np

from ..runtime.backend import Floats, Ints
from .settings import DecodeSettings


def sample(logits: Floats, mask_id: int, settings: DecodeSettings, rng: np.random.Generator) -> tuple[Ints, Floats]:
    """Tokens [m] and confidences [m] from logits [m, V].

    The mask token is never chosen. The confidence is the model's own probability of the chosen token (temperature 1,
    no filter): filters must not make a guess look certain.
    """
    logits = logits.astype(np.float64)
    logits[:, mask_id] = -np.inf
    probs = _softmax(logits)
    drawn = np.array([_draw(row, settings, u) for row, u in zip(logits, rng.random(len(logits)), strict=True)],
                     dtype=np.int64)
    return drawn, probs[np.arange(len(drawn)), drawn].astype(np.float32)


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
