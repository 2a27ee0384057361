"""`DmoeMixture` in PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..experts.eager import experts


def mixture(hidden: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: Tensor, down: Tensor,
            *scales_and_shared: Tensor) -> Tensor:
    """Arguments and result as in `SCHEMA`, or `QUANTISED_SCHEMA` with two more."""
    *scales, shared_gate_up, shared_down = scales_and_shared
    routed = experts(hidden, expert_ids, expert_weights, gate_up, down, *scales)
    return routed + shared_expert(hidden, shared_gate_up, shared_down)


def shared_expert(hidden: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """[N, H] → [N, H]; all gate rows above all up rows."""
    gate, up = F.linear(hidden, gate_up.to(hidden.dtype)).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down.to(hidden.dtype))
