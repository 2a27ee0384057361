"""What a model with a canvas draws from its logits: held against the logits, and entropy against the reference's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from .gates import Limits

_SUMS = 1e-3  # a cumulative sum of a vocabulary in float32 may be so far off


@dataclass(frozen=True)
class Draws:
    """Of the wanted places of one forward; true when within the limits."""

    same: np.ndarray  # [R] bool: the reference's id
    unexplained: int  # ids that the backend's own logits and the draws do not give
    entropy: np.ndarray  # [R] difference from the reference's, nats
    limits: Limits

    def __bool__(self) -> bool:
        return not self.unexplained and mean_difference([self]) <= self.limits.sequence_norm


def compare_draws(reference: Mapping[str, np.ndarray], backend: Mapping[str, np.ndarray], limits: Limits) -> Draws:
    """Ids and entropy of a forward. Two distributions that hardly differ may give other ids (where many probabilities
    are small, mostly do), so ids are held against the logits of the backend itself."""
    wanted = reference["logit_rows"] >= 0
    z = backend["logits"].astype(np.float64) / reference["temperature"][:, None, None]
    cumulative = np.cumsum(np.exp(z - z.max(axis=-1, keepdims=True)), axis=-1)
    ids = backend["sampled_ids"][..., None]
    upto = np.take_along_axis(cumulative, ids, -1)[..., 0] / cumulative[..., -1]
    before = np.where(ids[..., 0] > 0, np.take_along_axis(cumulative, np.maximum(ids - 1, 0), -1)[..., 0], 0.0)
    draws = reference["uniform"].astype(np.float64)
    explained = (before / cumulative[..., -1] <= draws + _SUMS) & (upto >= draws - _SUMS)  # NaN explains nothing
    difference = np.abs(backend["entropy"] - reference["entropy"].astype(np.float64))
    return Draws((backend["sampled_ids"] == reference["sampled_ids"])[wanted], int((~explained & wanted).sum()),
                 difference[wanted], limits)


def mean_difference(parts: Iterable[Draws]) -> float:
    """Of the entropies of several forwards; 1e30 where one is no number."""
    found = np.concatenate([part.entropy for part in parts])
    return float(found.mean()) if np.isfinite(found).all() else 1e30
