"""`DmoeRouter` in PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..block_route.attributes import RouteAttributes
from ..block_route.eager import block_route


def router(hidden: Tensor, router_weight: Tensor, expert_bias: Tensor, position_ids: Tensor, top_p: Tensor,
           min_experts: Tensor, coreset_size: Tensor, attributes: RouteAttributes) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as in `SCHEMA`."""
    logits = F.linear(hidden.float(), router_weight).reshape(*position_ids.shape, -1)
    ids, weights, _ = block_route(logits, expert_bias, position_ids, top_p, min_experts, coreset_size, attributes)
    return ids.flatten(0, 1), weights.flatten(0, 1), logits
