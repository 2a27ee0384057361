"""The comparison Polygraphy runs per forward: rows of tensors, and experts chosen; padding is left out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .draws import Draws, compare_draws
from .gates import Limits
from .reference import Reference
from .result import ConfidencePoint, RouterAgreement, TensorError

_NOTHING = np.zeros(0)
_FAR = 1e30  # stands for infinity, which JSON cannot say


@dataclass(frozen=True)
class RowErrors:
    """Errors of the rows of one tensor in one forward; true when within the limits."""

    cosine: np.ndarray  # [R]
    ratio: np.ndarray  # [R] |backend| / |reference|
    max_abs: float
    limits: Limits
    not_finite: int = 0  # rows with NaN or infinity on either side

    def __bool__(self) -> bool:
        return not len(self.cosine) or bool(
            self.cosine.min() >= self.limits.cosine and np.abs(self.ratio - 1).max() <= self.limits.norm)


@dataclass(frozen=True)
class Routed:
    """Experts chosen by one layer in one forward; true when the choices are the rule's, or mostly the same."""

    agree: np.ndarray  # [R] bool
    gaps: np.ndarray  # of the tokens that differ by their own choice: how far apart the scores were
    with_block: int  # tokens that differ because their block's coreset did
    reference: set[int]
    backend: set[int]
    unexplained: int | None  # tokens whose experts are not what the rule gives for the backend's own router logits
    limits: Limits

    def __bool__(self) -> bool:
        if self.unexplained is not None:
            return self.unexplained == 0
        return bool(self.agree.mean() >= self.limits.agreement) if len(self.agree) else True


Compared = Mapping[str, RowErrors | Routed | Draws | list[ConfidencePoint]]


class CompareForward:
    """Polygraphy's compare_func: a reference's forward and a backend's → result per output name."""

    def __init__(self, reference: Reference, limits: Limits) -> None:
        self._reference, self._limits = reference, limits

    def __call__(self, reference: Any, backend: Any) -> OrderedDict[str, object]:
        """Only what the backend shows is compared; a feed-forward of experts only where the experts agree."""
        reference, backend = dict(reference.items()), dict(backend.items())  # Polygraphy's results are not quite dicts
        valid, wanted = reference["position_ids"] >= 0, reference["logit_rows"] >= 0
        results: OrderedDict[str, object] = OrderedDict()
        agree: dict[str, np.ndarray] = {}
        for name, got in backend.items():
            kind, _, layer = name.partition(".")
            if kind == "expert_ids":
                agree[layer] = _same_experts(reference[name], got)
                results[name] = self._routed(int(layer), reference, backend, valid)
        for name, got in backend.items():
            kind, _, layer = name.partition(".")
            expected = reference.get(name)
            if expected is None or kind in ("expert_ids", "token_ids", "confidence", "sampled_ids", "entropy"):
                continue
            rows = wanted if kind in ("logits", "next_soft_embeddings") else valid
            if kind in ("key", "value"):  # [B, Hkv, T, D] → [B, T, Hkv, D]
                expected, got = expected.swapaxes(1, 2), got.swapaxes(1, 2)
            if kind == "feed_forward":
                rows = rows & agree.get(layer, np.ones_like(rows))
            results[name] = row_errors(expected[rows], got[rows], self._limits)
            if kind == "feed_forward" and f"attention.{layer}" in backend:
                mine, theirs = (side[name].astype(np.float32) + side[f"attention.{layer}"]
                                for side in (backend, reference))
                results[f"update.{layer}"] = row_errors(theirs[rows], mine[rows], self._limits)
        if "sampled_ids" in backend:
            results["draws"] = compare_draws(reference, backend, self._limits)
        if "confidence" in backend:
            results["confidence"] = _confidence(reference, backend, wanted)
        return results

    def _routed(self, layer: int, reference: Mapping[str, np.ndarray], backend: Mapping[str, np.ndarray],
                valid: np.ndarray) -> Routed:
        ids, mine = reference[f"expert_ids.{layer}"], backend[f"expert_ids.{layer}"]
        agree = _same_experts(ids, mine)
        apart = valid & ~agree
        gaps, with_block = self._gaps(layer, reference, mine, apart)
        logits = backend.get(f"router_logits.{layer}")
        unexplained = None
        if logits is not None:
            strange = valid.copy()
            for trial in range(9):  # the rule as it is, then with sums that round differently
                if not strange.any():
                    break
                noise = np.random.default_rng(trial).normal(0, 1e-6, logits.shape).astype(np.float32)
                moved = logits.astype(np.float32) * (1 + noise * bool(trial))
                rule, _ = self._reference.route(layer, moved, _places(reference))
                strange &= ~_same_experts(rule, mine)
            unexplained = int(strange.sum())
        return Routed(agree[valid], gaps, with_block, _used(ids[valid]), _used(mine[valid]), unexplained, self._limits)

    def _gaps(self, layer: int, reference: Mapping[str, np.ndarray], mine: np.ndarray,
              apart: np.ndarray) -> tuple[np.ndarray, int]:
        """Score gaps of the tokens `apart` that chose for themselves, and how many followed their block."""
        logits, positions = reference[f"router_logits.{layer}"], _places(reference)
        scores = self._reference.scores(layer, logits)
        _, coreset = self._reference.route(layer, logits, positions)
        blocks = positions // self._reference.routing.block_length
        gaps, with_block = [], 0
        for row, token in zip(*np.nonzero(apart), strict=True):
            block = blocks[row] == blocks[row, token]
            theirs, ours = set(reference[f"expert_ids.{layer}"][row, token]), set(mine[row, token])
            came, left = ours - theirs, theirs - ours
            if all(i < 0 or coreset[row, token, i] for i in came) and left <= {*mine[row, block].ravel()}:
                gaps.append(_gap(scores[row, token], left, came))
            else:
                with_block += 1
        return np.array(gaps), with_block


def _places(reference: Mapping[str, np.ndarray]) -> np.ndarray:
    """Positions [B,T] by which routing makes blocks: of a canvas counted from its start; −1 = padding."""
    positions = reference["position_ids"]
    if "denoise" not in reference:
        return positions
    valid = positions >= 0
    starts = np.where(valid, positions, np.iinfo(positions.dtype).max).min(axis=1, keepdims=True)
    return np.where(valid, positions - np.where(reference["denoise"][:, None], starts, 0), positions)


def row_errors(expected: np.ndarray, got: np.ndarray, limits: Limits) -> RowErrors:
    """Errors of `got` [R, …] against `expected` [R, …], row by row in float64."""
    if not len(expected):
        return RowErrors(_NOTHING, _NOTHING, 0.0, limits)
    a = expected.reshape(len(expected), -1).astype(np.float64)
    b = got.reshape(len(got), -1).astype(np.float64)
    finite = np.isfinite(a).all(axis=1) & np.isfinite(b).all(axis=1)
    a[~finite] = b[~finite] = 0  # keeps the sums quiet; such rows are as wrong as can be, below
    size_a, size_b = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    both_zero = (size_a == 0) & (size_b == 0)
    product = size_a * size_b
    cosine = np.divide((a * b).sum(axis=1), product, out=np.where(both_zero, 1.0, 0.0), where=product > 0)
    ratio = np.divide(size_b, size_a, out=np.where(both_zero, 1.0, _FAR), where=size_a > 0)
    cosine[~finite], ratio[~finite] = -1, _FAR
    return RowErrors(np.clip(cosine, -1, 1), ratio, float(np.abs(a - b).max()) if finite.all() else _FAR, limits,
                     int((~finite).sum()))


def tensor_error(parts: Iterable[RowErrors]) -> TensorError:
    """Several forwards as one."""
    parts = list(parts)
    cosine = np.concatenate([part.cosine for part in parts])
    ratio = np.concatenate([part.ratio for part in parts])
    if not len(cosine):
        return TensorError(cosine_worst=1, cosine_mean=1, norm_ratio_low=1, norm_ratio_high=1, norm_ratio_mean=1,
                           max_abs=0, rows=0)
    return TensorError(cosine_worst=float(cosine.min()), cosine_mean=float(cosine.mean()),
                       norm_ratio_low=float(ratio.min()), norm_ratio_high=float(ratio.max()),
                       norm_ratio_mean=float(ratio.mean()), max_abs=max(part.max_abs for part in parts),
                       rows=len(cosine), not_finite=sum(part.not_finite for part in parts))


def router_agreement(parts: Iterable[Routed]) -> RouterAgreement:
    """Several forwards as one."""
    parts = list(parts)
    known = [part.unexplained for part in parts if part.unexplained is not None]
    return RouterAgreement(
        tokens=sum(len(part.agree) for part in parts), agreeing=sum(int(part.agree.sum()) for part in parts),
        largest_gap=float(max((part.gaps.max() for part in parts if len(part.gaps)), default=0.0)),
        unique_reference=len(set().union(*(part.reference for part in parts))),
        unique_backend=len(set().union(*(part.backend for part in parts))),
        with_block=sum(part.with_block for part in parts), unexplained=sum(known) if known else None)


def _same_experts(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[B, T, k] twice → [B, T]: equal as sets."""
    return (np.sort(a, axis=-1) == np.sort(b, axis=-1)).all(axis=-1)


def _used(ids: np.ndarray) -> set[int]:
    return {int(i) for i in np.unique(ids) if i >= 0}


def _gap(scores: np.ndarray, left: set[int], came: set[int]) -> float:
    """Largest difference between the score [E] of an expert that left the set and of the one that came instead."""
    pairs = zip(*(sorted((float(scores[i]) for i in side if i >= 0), reverse=True) for side in (left, came)),
                strict=False)
    # Where one side found no expert at all (−1) nothing is near.
    return 1.0 if (-1 in left) != (-1 in came) else max(abs(a - b) for a, b in pairs)


def _confidence(reference: Mapping[str, np.ndarray], backend: Mapping[str, np.ndarray],
                wanted: np.ndarray) -> list[ConfidencePoint]:
    """Of the positions where both are numbers: a best token among NaN is none."""
    same = reference["token_ids"] == backend["token_ids"]
    wanted = wanted & np.isfinite(reference["confidence"]) & np.isfinite(backend["confidence"])
    return [ConfidencePoint(reference=float(a), backend=float(b), same_token=bool(s)) for a, b, s in
            zip(reference["confidence"][wanted], backend["confidence"][wanted], same[wanted], strict=True)]


def first_not_finite(forwards: Iterable[Mapping[str, np.ndarray]], layers: int) -> tuple[int | None, str] | None:
    """The layer (None outside layers) and the part, in the order of computing, where a model's numbers end; or None."""
    forwards = list(forwards)
    parts: list[tuple[int | None, str, str]] = [(None, "embedding", "stream.0")]
    for layer in range(layers):
        parts += [(layer, part, f"{part}.{layer}") for part in
                  ("key", "value", "attention", "router_logits", "feed_forward")]
    for at, part, name in [*parts, (None, "head", "logits")]:
        for forward in forwards:
            rows = forward["logit_rows" if name == "logits" else "position_ids"] >= 0
            if name in forward:
                values = forward[name].swapaxes(1, 2) if part in ("key", "value") else forward[name]
                if not np.isfinite(values[rows]).all():
                    return at, part.replace("_", "-")
    return None
