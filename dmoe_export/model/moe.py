"""The mixture-of-experts layer: float32 router, block routing, experts, shared experts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..description import ModelDescription, RoutingDescription
from ..ops.block_route.attributes import RouteAttributes
from ..ops.torch_ops import experts, mixture, router
from ..weight_formats import ExpertQuantisation
from .layers import SharedExpert


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
    """Router weights, float32 whatever the model's precision: logits decide, and halves tie. The op multiplies."""

    def __init__(self, hidden: int, num_experts: int, biased: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden, dtype=torch.float32))
        self.expert_bias = (nn.Parameter(torch.zeros(num_experts, dtype=torch.float32), requires_grad=False)
                            if biased else None)
        if not self.weight.is_meta:
            nn.init.normal_(self.weight, std=hidden**-0.5)

    def forward(self, x: Tensor, position_ids: Tensor, settings: RoutingSettings,
                attributes: RouteAttributes) -> tuple[Tensor, Tensor, Tensor]:
        """x [N,H], positions [B,T] → expert ids, weights [N,k], router logits [B,T,E]; N = B·T."""
        bias = self.expert_bias
        if bias is None:  # the op always takes one; in the graph it is a constant of zeros
            bias = torch.zeros(self.weight.shape[0], device=x.device)
        return router(x, self.weight, bias, position_ids, *settings, attributes)


class MoE(nn.Module):
    """Routed experts plus shared experts."""

    def __init__(self, d: ModelDescription, routing: RoutingDescription, dtype: torch.dtype,
                 stored_width: int | None = None, quantisation: ExpertQuantisation | None = None) -> None:
        super().__init__()
        moe = d.experts
        width = stored_width or moe.expert_width  # wider than expert_width when the bundle pads slabs to pages
        self.activation = d.activation
        self.attributes = RouteAttributes.of(moe, routing.mode, routing.block_length)
        self.router = Router(d.hidden_size, moe.num_experts, moe.expert_bias)
        self.quantisation = quantisation
        self.gate_up, self.gate_up_scales = _weights((moe.num_experts, 2 * width, d.hidden_size), dtype, quantisation)
        self.down, self.down_scales = _weights((moe.num_experts, d.hidden_size, width), dtype, quantisation)
        self.shared = SharedExpert(d.hidden_size, moe.shared_width, dtype) if moe.shared_width else None
        self.one_op = True  # routed and shared experts together; False: linear layers that may become integers
        if not self.gate_up.is_meta and quantisation is None:
            nn.init.normal_(self.gate_up, std=d.hidden_size**-0.5)
            nn.init.normal_(self.down, std=moe.expert_width**-0.5)

    def forward(self, x: Tensor, position_ids: Tensor, settings: RoutingSettings) -> tuple[Tensor, Tensor, Tensor]:
        """x [N,H], positions [B,T] → output [N,H], expert ids [B,T,k] int32, router logits [B,T,E]; N = B·T."""
        ids, weights, logits = self.router(x, position_ids, settings, self.attributes)
        if self.shared is None:
            mixed = self.routed(x, ids, weights)
        elif self.one_op:
            mixed = mixture(x, ids, weights, *self._experts, (self.shared.gate_up.weight, self.shared.down.weight))
        else:
            mixed = self.routed(x, ids, weights) + self.shared(x)
        return mixed, ids.reshape(*position_ids.shape, -1), logits

    def routed(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The routed experts alone: x [N,H], ids and weights [N,k] → [N,H]."""
        return experts(x, ids, weights, *self._experts, activation=self.activation)

    @property
    def _experts(self) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None, ExpertQuantisation | None]:
        if self.quantisation is None:
            return self.gate_up, self.down, None, None
        assert self.gate_up_scales is not None and self.down_scales is not None
        return self.gate_up, self.down, (self.gate_up_scales, self.down_scales), self.quantisation


def _weights(shape: tuple[int, int, int], dtype: torch.dtype,
             how: ExpertQuantisation | None) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Room for the experts' weights; quantised, for packed integers and their scales."""
    if how is None:
        return nn.Parameter(torch.empty(shape, dtype=dtype)), None
    experts, rows, inner = shape
    return (nn.Parameter(torch.empty(experts, rows, inner * how.bits // 8, dtype=torch.uint8), requires_grad=False),
            nn.Parameter(torch.empty(experts, rows, inner // how.group_size, dtype=dtype), requires_grad=False))
