"""Eager PyTorch implementation of `DmoeExperts`: one pass per active expert, differentiable."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from . import Activation
from .quantised import dequantise

_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


def experts(hidden: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: Tensor, down: Tensor,
            gate_up_scales: Tensor | None = None, down_scales: Tensor | None = None, *,
            activation: Activation = "silu") -> Tensor:
    """Mixed output [N,H]; see the package docstring for the arguments. Quantised where there are scales."""
    k = expert_ids.shape[-1]
    pair_expert = expert_ids.reshape(-1)  # [N·k], pairs (token, place) in token order
    order = torch.argsort(pair_expert, stable=True)
    counts = torch.bincount(pair_expert.clamp(min=0) + (pair_expert >= 0), minlength=gate_up.shape[0] + 1).tolist()
    order = order[counts[0]:]  # pairs without an expert sort first
    bits = 8 * gate_up.shape[-1] // hidden.shape[-1] if gate_up_scales is not None else 0  # of a packed row
    pieces = []
    # unbind and split, not indexing: the gradient of an index is a zero tensor of full size per expert.
    per_expert = zip(hidden[order // k].split(counts[1:]), _slabs(gate_up, gate_up_scales), _slabs(down, down_scales),
                     strict=True)
    for x, gate_up_slab, down_slab in per_expert:
        if len(x):
            gate_and_up = x @ _matrix(*gate_up_slab, bits, hidden.dtype).T
            gate, up = gate_and_up.unflatten(-1, (-1, 2)).unbind(-1)  # [n, I] each
            pieces.append((activate(gate, activation) * up) @ _matrix(*down_slab, bits, hidden.dtype).T)
    mixed = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    if pieces:
        weighted = torch.cat(pieces).float() * expert_weights.reshape(-1)[order, None]
        mixed = mixed.index_add(0, order // k, weighted)
    return mixed.to(hidden.dtype)


def activate(gate: Tensor, activation: Activation) -> Tensor:
    """What `up` is multiplied with, of any shape."""
    return _ACTIVATIONS[activation](gate)


def _slabs(weights: Tensor, scales: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Weights and scales of each expert."""
    return zip(weights.unbind(0), scales.unbind(0) if scales is not None else [None] * weights.shape[0], strict=True)


def _matrix(slab: Tensor, scales: Tensor | None, bits: int, dtype: torch.dtype) -> Tensor:
    """An expert's matrix as it is multiplied with."""
    return (slab if scales is None else dequantise(slab, scales, bits)).to(dtype)
