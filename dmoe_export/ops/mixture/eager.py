"""`DmoeMixture` in PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..experts import Activation
from ..experts.eager import activate, experts


def mixture(hidden: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: Tensor, down: Tensor,
            *scales_and_shared: Tensor, activation: Activation = "silu") -> Tensor:
    """Arguments and result as in `SCHEMA`, or `QUANTISED_SCHEMA` with two more."""
    *scales, shared_gate_up, shared_down = scales_and_shared
    routed = experts(hidden, expert_ids, expert_weights, gate_up, down, *scales, activation=activation)
    return routed + shared_expert(hidden, shared_gate_up, shared_down, activation)


def shared_expert(hidden: Tensor, gate_up: Tensor, down: Tensor, activation: Activation = "silu") -> Tensor:
    """[N, H] → [N, H]; all gate rows above all up rows."""
    gate, up = F.linear(hidden, gate_up.to(hidden.dtype)).chunk(2, dim=-1)
    return F.linear(activate(gate, activation) * up, down.to(hidden.dtype))
