"""Eager PyTorch implementation of `DmoeExperts`: one pass per active expert, differentiable."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def experts(hidden: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Mixed output [N,H]; see the package docstring for the arguments."""
    k = expert_ids.shape[-1]
    pair_expert = expert_ids.reshape(-1)  # [N·k], pairs (token, place) in token order
    order = torch.argsort(pair_expert, stable=True)
    counts = torch.bincount(pair_expert.clamp(min=0) + (pair_expert >= 0), minlength=gate_up.shape[0] + 1).tolist()
    order = order[counts[0]:]  # pairs without an expert sort first
    pieces = []
    # unbind and split, not indexing: the gradient of an index is a zero tensor of full size per expert.
    per_expert = zip(hidden[order // k].split(counts[1:]), gate_up.unbind(0), down.unbind(0), strict=True)
    for x, expert_gate_up, expert_down in per_expert:
        if len(x):
            gate, up = (x @ expert_gate_up.T).unflatten(-1, (-1, 2)).unbind(-1)  # [n, I] each
            pieces.append((F.silu(gate) * up) @ expert_down.T)
    mixed = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    if pieces:
        weighted = torch.cat(pieces).float() * expert_weights.reshape(-1)[order, None]
        mixed = mixed.index_add(0, order // k, weighted)
    return mixed.to(hidden.dtype)
