"""Weights that an export rounds, in a check: the reference takes the stored values, and their cost is said beside it.

So the gates stay those of the compute type: they hold the backend against what the bundle stores, and the error that
rounding the weights itself makes is a number of the report, not a gate.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..bundle.manifest import Manifest
from ..checkpoint.family import Checkpoint
from ..description import ExportPrecision
from ..export.conversion import DTYPES
from ..export.formats import stored_precision
from ..ops.experts.quantised import dequantise, quantise
from .compare import row_errors, tensor_error
from .gates import Limits
from .result import QuantisationCheck
from .sources import WeightSource

Arrays = dict[str, np.ndarray]


class RoundedWeights:
    """Another source's weights as the bundle's export stored them, where that is not in the compute type."""

    def __init__(self, source: WeightSource, manifest: Manifest) -> None:
        self.description, self.original = source.description, source
        self._formats, self._compute = manifest.formats, manifest.precision
        self._width = manifest.experts.stored_width if manifest.experts else 0

    def dense(self, name: str, rows: slice | None = None) -> Tensor:
        """As in WeightSource."""
        weight = self.original.dense(name, rows)
        return self._rounded(weight, self._formats.of(name, weight.shape[-1], self._compute))

    def gate_up(self, layer: int, expert: int) -> Tensor:
        """As in WeightSource."""
        return self._rounded(self.original.gate_up(layer, expert), self._formats.experts)

    def down(self, layer: int, expert: int) -> Tensor:
        """As in WeightSource."""
        slab = self.original.down(layer, expert)
        padded = F.pad(slab, (0, self._width - slab.shape[-1]))  # groups run along the stored width
        return self._rounded(padded, self._formats.experts)[:, :slab.shape[-1]]

    def _rounded(self, weight: Tensor, stored: ExportPrecision | None) -> Tensor:
        how = self._formats.quantisation(stored)
        if how:
            return dequantise(*quantise(weight, how, DTYPES[self._compute]), how.bits)
        return weight if stored in (None, self._compute) else weight.to(DTYPES[stored]).float()


def is_rounded(manifest: Manifest, checkpoint: Checkpoint) -> bool:
    """Whether some weights are stored in another type than is computed with, and not exactly."""
    exact, formats = stored_precision(checkpoint.weights.matrix_types)[0], manifest.formats
    return any(stored not in (manifest.precision, exact) for stored in formats.parts.values())


def compare_quantised(manifest: Manifest, original: list[Arrays], quantised: list[Arrays],
                      limits: Limits) -> QuantisationCheck:
    """The reference with the checkpoint's own weights against the reference with the quantised ones, same forwards."""
    formats = manifest.formats
    logits, divergences, same_tokens, same_experts = [], list[np.ndarray](), list[np.ndarray](), list[np.ndarray]()
    for theirs, ours in zip(original, quantised, strict=True):
        wanted, valid = theirs["logit_rows"] >= 0, theirs["position_ids"] >= 0
        logits.append(row_errors(theirs["logits"][wanted], ours["logits"][wanted], limits))
        divergences.append(_divergence(theirs["logits"][wanted], ours["logits"][wanted]))
        same_tokens.append((theirs["token_ids"] == ours["token_ids"])[wanted])
        for layer in manifest.model.moe_layers:
            name = f"expert_ids.{layer}"
            if name in theirs:
                same_experts.append((np.sort(theirs[name]) == np.sort(ours[name])).all(axis=-1)[valid])
    error = tensor_error(logits)
    known = not error.not_finite
    return QuantisationCheck(
        weights=formats.in_words(manifest.precision), group_size=formats.group_size, logits=error,
        divergence=float(np.concatenate(divergences).mean()) if known else None,
        same_best_token=float(np.concatenate(same_tokens).mean()) if known else None,
        same_experts=float(np.concatenate(same_experts).mean()) if same_experts else None)


def _divergence(expected: np.ndarray, got: np.ndarray) -> np.ndarray:
    """Kullback-Leibler divergence of each row of logits [R, V], in nats."""
    p, q = (torch.log_softmax(torch.from_numpy(x).double(), -1) for x in (expected, got))
    return (p.exp() * (p - q)).sum(-1).numpy()
