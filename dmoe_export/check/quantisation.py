"""Quantised experts in a check: the reference takes the quantised values, and what they cost is said beside it.

So the gates stay those of the bundle's precision: they hold the backend against what the bundle stores, and the error
that quantisation itself makes is a number of the report, not a gate.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..bundle.manifest import Manifest
from ..export.exporter import DTYPES
from ..ops.experts.quantised import dequantise, quantise
from .compare import row_errors, tensor_error
from .gates import Limits
from .result import QuantisationCheck
from .sources import WeightSource

Arrays = dict[str, np.ndarray]


class QuantisedWeights:
    """Another source's weights with the routed experts rounded as the bundle's export rounded them."""

    def __init__(self, source: WeightSource, manifest: Manifest) -> None:
        """Of a manifest whose experts are quantised."""
        assert manifest.experts and manifest.experts.quantisation
        self.description, self.original = source.description, source
        self._how, self._dtype = manifest.experts.quantisation, DTYPES[manifest.precision]
        self._width = manifest.experts.stored_width

    def dense(self, name: str, rows: slice | None = None) -> Tensor:
        """As in WeightSource."""
        return self.original.dense(name, rows)

    def gate_up(self, layer: int, expert: int) -> Tensor:
        """As in WeightSource."""
        return self._rounded(self.original.gate_up(layer, expert))

    def down(self, layer: int, expert: int) -> Tensor:
        """As in WeightSource."""
        slab = self.original.down(layer, expert)
        padded = F.pad(slab, (0, self._width - slab.shape[-1]))  # groups run along the stored width
        return self._rounded(padded)[:, :slab.shape[-1]]

    def _rounded(self, weight: Tensor) -> Tensor:
        return dequantise(*quantise(weight, self._how, self._dtype), self._how.bits)


def compare_quantised(manifest: Manifest, original: list[Arrays], quantised: list[Arrays],
                      limits: Limits) -> QuantisationCheck:
    """The reference with the checkpoint's own weights against the reference with the quantised ones, same forwards."""
    how = manifest.quantisation
    assert how
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
        bits=how.bits, group_size=how.group_size, logits=error,
        divergence=float(np.concatenate(divergences).mean()) if known else None,
        same_best_token=float(np.concatenate(same_tokens).mean()) if known else None,
        same_experts=float(np.concatenate(same_experts).mean()))


def _divergence(expected: np.ndarray, got: np.ndarray) -> np.ndarray:
    """Kullback-Leibler divergence of each row of logits [R, V], in nats."""
    p, q = (torch.log_softmax(torch.from_numpy(x).double(), -1) for x in (expected, got))
    return (p.exp() * (p - q)).sum(-1).numpy()
