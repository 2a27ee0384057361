"""Choosing tokens from logits with temperature, top-k and top-p, or from the best few of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.backend import Bools, Ints
from ..runtime.candidates import MOST
from .settings import DecodeSettings

Reals = NDArray[np.floating[Any]]


def without(logits: Reals, mask_id: int) -> Reals:
    """Logits [m, V] in float64 in which the mask token cannot be chosen; −1: there is none."""
    allowed = logits.astype(np.float64)
    if mask_id >= 0:
        allowed[:, mask_id] = -np.inf
    return allowed


def greedy(logits: Reals, allowed: Reals | None = None) -> tuple[Ints, Reals]:
    """Best tokens [m] and their probabilities [m] from logits [m, V]; ties: lower id first.

    `allowed`: the same logits with −∞ for tokens that are not chosen.
    """
    tokens = (logits if allowed is None else allowed).argmax(axis=-1)
    return tokens, _probabilities(logits, tokens)


def sample(logits: Reals, settings: DecodeSettings, rng: np.random.Generator, allowed: Reals | None = None
           ) -> tuple[Ints, Reals]:
    """Drawn tokens [m] and confidences [m] from logits [m, V]; `allowed` as in `greedy`.

    The confidence is the model's own probability of the drawn token (temperature 1, no filter): filters must not make a
    guess look certain.
    """
    drawn = np.zeros(len(logits), np.int64)
    drawable = logits if allowed is None else allowed
    for i, (row, u) in enumerate(zip(drawable, rng.random(len(logits)), strict=True)):
        rising = np.sort(-row)[:settings.top_k or None]  # numbers alone: several times as fast as to sort tokens
        place = _draw(-rising, settings, u)
        equals = place - np.searchsorted(rising, rising[place])  # of equal logits the lower token comes first
        drawn[i] = np.flatnonzero(row == -rising[place])[equals]
    return drawn, _probabilities(logits, drawn)


def draws_from(settings: DecodeSettings, vocabulary: int, barred: int = 0) -> int:
    """How many of the best tokens are enough for `sample_best`; 0 where it takes all logits.

    `barred`: how many tokens are not drawn (`spared` leaves them out). Without `top_k`, temperature and `top_p` share
    out a sum over all tokens; credit raises any token.
    """
    enough = settings.temperature > 0 and 0 < settings.top_k <= MOST - barred and settings.acceptance != "credit"
    return min(settings.top_k + barred, vocabulary) if enough else 0


def spared(token_ids: NDArray[np.int32], logits: Reals, best: Reals, out: Bools
           ) -> tuple[NDArray[np.int32], Reals, Reals]:
    """Candidates as `sample_best` takes them without those that are `out` [m, K]: they are last, as what there is no
    more of.

    `best` [m]: the first's probability; that of the new first keeps the others' share, so what the model would rather
    not say is no certain token.
    """
    order = np.argsort(out, axis=1, kind="stable")
    ids, values = (np.take_along_axis(np.where(out, nothing, given), order, axis=1)
                   for nothing, given in ((-1, token_ids), (-np.inf, logits)))
    return ids, values, (best * np.exp(values[:, 0].astype(np.float64) - logits[:, 0])).astype(np.float32)


def sample_best(token_ids: NDArray[np.int32], logits: Reals, best: Reals, settings: DecodeSettings,
                rng: np.random.Generator) -> tuple[Ints, Reals]:
    """As `sample`, from the best tokens alone: ids and logits [m, K], best first; K as `draws_from` says, or more.

    The same tokens, bit for bit. The confidences follow from `best` [m], the best token's, and are as exact as that:
    a sum in float32, where `sample` has float64.
    """
    ids, values = token_ids[:, :settings.top_k], logits[:, :settings.top_k].astype(np.float64)
    places = np.array([_draw(row, settings, u) for row, u in zip(values, rng.random(len(values)), strict=True)],
                      dtype=np.int64)
    rows = np.arange(len(values))
    return ids[rows, places].astype(np.int64), (best * np.exp(values[rows, places] - values[:, 0])).astype(np.float32)


def barring(logits: Reals, barred: Sequence[int], places: Bools | None = None) -> Reals:
    """Logits [m, V] without `barred` tokens, at these places [m] or all."""
    if not barred:
        return logits
    allowed = logits.copy()
    rows = np.flatnonzero(np.ones(len(logits), bool) if places is None else places)
    allowed[rows[:, None], np.array(barred)] = -np.inf
    return allowed


def _probabilities(logits: Reals, tokens: Ints) -> Reals:
    return _softmax(logits)[np.arange(len(tokens)), tokens].astype(np.float32)


def _softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def _draw(logits: np.ndarray, settings: DecodeSettings, u: float) -> int:
    """Inverse-CDF draw among logits in falling order, so that one uniform number decides; the place drawn."""
    with np.errstate(over="ignore"):  # almost cold: all but the best are −inf, and it stays 0
        cumulative = _softmax((logits - logits[0]) / settings.temperature).cumsum()
    if settings.top_p < 1:
        keep = int(np.searchsorted(cumulative, settings.top_p)) + 1  # the one that crosses stays
        cumulative = cumulative[:keep]
    return min(int(np.searchsorted(cumulative, u * cumulative[-1], side="right")), len(cumulative) - 1)
