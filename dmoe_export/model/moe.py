"""The mixture-of-experts layer: float32 router, block routing, experts, shared experts."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..description import ExpertQuantisation, ModelDescription, RoutingDescription
from ..ops.block_route.attributes import RouteAttributes
from ..ops.torch_ops import block_route, experts
from .layers import FeedForward


class RoutingSettings(NamedTuple):
    """The settings a forward may change, as tensors of shape [1]: top_p float32, the others int64."""

    top_p: Tensor
    min_experts: Tensor
    coreset_size: Tensor

    @classmethod
    def of(cls, routing: RoutingDescription) -> RoutingSettings:
        """The defaults of a model's routing."""
        return cls(torch.tensor([routing.top_p], dtype=torch.float32), torch.tensor([routing.min_experts]),
                   torch.tensor([routing.coreset_size]))


class Router(nn.Module):
    """Router weights, float32 whatever the model's precision: logits decide, and halves tie."""

    def __init__(self, hidden: int, num_experts: int, biased: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden, dtype=torch.float32))
        self.expert_bias = (nn.Parameter(torch.zeros(num_experts, dtype=torch.float32), requires_grad=False)
                            if biased else None)
        if not self.weight.is_meta:
            nn.init.normal_(self.weight, std=hidden**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """[N, H] → router logits [N, E] float32."""
        return F.linear(x.float(), self.weight)


class MoE(nn.Module):
    """Routed experts plus shared experts."""

    def __init__(self, d: ModelDescription, routing: RoutingDescription, dtype: torch.dtype,
                 stored_width: int | None = None, quantisation: ExpertQuantisation | None = None) -> None:
        super().__init__()
        moe = d.experts
        width = stored_width or moe.expert_width  # wider than expert_width when the bundle pads slabs to pages
        self.num_experts = moe.num_experts
        self.attributes = RouteAttributes.of(moe, routing.mode, routing.block_length)
        self.router = Router(d.hidden_size, moe.num_experts, moe.expert_bias)
        self.quantisation = quantisation
        self.gate_up, self.gate_up_scales = _weights((moe.num_experts, 2 * width, d.hidden_size), dtype, quantisation)
        self.down, self.down_scales = _weights((moe.num_experts, d.hidden_size, width), dtype, quantisation)
        self.shared = FeedForward(d.hidden_size, moe.shared_width, dtype) if moe.shared_width else None
        if not self.gate_up.is_meta and quantisation is None:
            nn.init.normal_(self.gate_up, std=d.hidden_size**-0.5)
            nn.init.normal_(self.down, std=moe.expert_width**-0.5)

    def forward(self, x: Tensor, position_ids: Tensor, settings: RoutingSettings) -> tuple[Tensor, Tensor, Tensor]:
        """x [N,H], positions [B,T] → output [N,H], expert ids [B,T,k] int32, router logits [B,T,E]; N = B·T."""
        rows, tokens = position_ids.shape
        logits = self.router(x).reshape(rows, tokens, self.num_experts)
        bias = self.router.expert_bias
        if bias is None:  # the op always takes one; in the graph it is a constant of zeros
            bias = torch.zeros(self.num_experts, device=x.device)
        ids, weights, _ = block_route(logits, bias, position_ids, *settings, self.attributes)
        scales = None if self.quantisation is None else (self.gate_up_scales, self.down_scales)
        mixed = experts(x, ids.flatten(0, 1), weights.flatten(0, 1), self.gate_up, self.down, scales, self.quantisation)
        return (mixed if self.shared is None else mixed + self.shared(x)), ids, logits


def _weights(shape: tuple[int, int, int], dtype: torch.dtype,
             how: ExpertQuantisation | None) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Room for the experts' weights; quantised, for packed integers and their scales."""
    if how is None:
        return nn.Parameter(torch.empty(shape, dtype=dtype)), None
    experts, rows, inner = shape
    return (nn.Parameter(torch.empty(experts, rows, inner * how.bits // 8, dtype=torch.uint8), requires_grad=False),
            nn.Parameter(torch.empty(experts, rows, inner // how.group_size, dtype=dtype), requires_grad=False))
