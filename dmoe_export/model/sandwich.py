"""Layers whose halves have a norm before and behind them, with experts beside a dense feed-forward (Gemma 4)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..description import ModelDescription, RoutingDescription
from ..ops.block_route.attributes import RouteAttributes
from ..weight_formats import ExpertQuantisation
from .canvas_attention import CanvasAttention
from .layers import FeedForward
from .moe import MoE, Router, RoutingSettings


class ResidualRouter(Router):
    """A router that reads the residual stream through a norm of its own, with a factor per expert on weights."""

    def __init__(self, hidden: int, num_experts: int, biased: bool, eps: float) -> None:
        super().__init__(hidden, num_experts, biased)
        self.norm = nn.Parameter(torch.ones(hidden, dtype=torch.float32))
        self.expert_scale = nn.Parameter(torch.ones(num_experts, dtype=torch.float32))
        self.eps = eps

    def forward(self, x: Tensor, position_ids: Tensor, settings: RoutingSettings,
                attributes: RouteAttributes) -> tuple[Tensor, Tensor, Tensor]:
        """As in `Router`; x is the stream as it is."""
        hidden = x.shape[-1]
        ids, weights, logits = super().forward(
            F.rms_norm(x.float(), (hidden,), self.norm, self.eps) * hidden**-0.5, position_ids, settings, attributes)
        factors = self.expert_scale.index_select(0, ids.clamp(min=0).flatten().long())
        return ids, weights * factors.reshape(ids.shape), logits


class MixtureBesideDense(MoE):
    """Experts and a dense feed-forward, each between two norms, added."""

    def __init__(self, d: ModelDescription, routing: RoutingDescription, dtype: torch.dtype,
                 stored_width: int | None = None, quantisation: ExpertQuantisation | None = None) -> None:
        super().__init__(d, routing, dtype, stored_width, quantisation)
        self.router = ResidualRouter(d.hidden_size, d.experts.num_experts, d.experts.expert_bias, d.rms_eps)
        self.dense = FeedForward(d.hidden_size, d.dense_width, dtype, d.activation)
        self.dense_norm, self.dense_post_norm = _norm(d, dtype), _norm(d, dtype)
        self.experts_norm, self.experts_post_norm = _norm(d, dtype), _norm(d, dtype)

    def forward(self, x: Tensor, position_ids: Tensor, settings: RoutingSettings) -> tuple[Tensor, Tensor, Tensor]:
        """As in `MoE`; x is the residual stream as it is."""
        ids, weights, logits = self.router(x, position_ids, settings, self.attributes)
        dense = self.dense_post_norm(self.dense(self.dense_norm(x)))
        experts = self.experts_post_norm(self.routed(self.experts_norm(x), ids, weights))
        return dense + experts, ids.reshape(*position_ids.shape, -1), logits


class Rows(NamedTuple):
    """What all layers of a forward share."""

    places: Tensor  # [B, T] positions that blocks of routing count: of a canvas from its start; −1 = padding
    denoise: Tensor  # [N, 1] bool, N = B·T: phase of each token's row
    settings: RoutingSettings


class SandwichLayer(nn.Module):
    """A layer of the two-phase stack; the phase chooses the factor of what leaves it."""

    def __init__(self, d: ModelDescription, routing: RoutingDescription, index: int, dtype: torch.dtype,
                 stored_width: int | None, quantisation: ExpertQuantisation | None = None) -> None:
        super().__init__()
        self.attention_norm, self.attention_post_norm = _norm(d, dtype), _norm(d, dtype)
        self.attention = CanvasAttention(d, index, dtype)
        self.ffn = MixtureBesideDense(d, routing, dtype, stored_width, quantisation)
        self.ffn_post_norm = _norm(d, dtype)
        self.encode_scale = nn.Parameter(torch.ones(1, dtype=dtype))
        self.denoise_scale = nn.Parameter(torch.ones(1, dtype=dtype))

    def forward(self, x: Tensor, rows: Rows, angles: tuple[Tensor, Tensor], bias: Tensor, past_key: Tensor,
                past_value: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """x [N,H] → x, key and value [B,Hkv,T,D], expert ids [B,T,k] and router logits [B,T,E]."""
        attended, key, value = self.attention(self.attention_norm(x), angles, bias, past_key, past_value)
        x = x + self.attention_post_norm(attended)
        mixed, ids, logits = self.ffn(x, rows.places, rows.settings)
        x = x + self.ffn_post_norm(mixed)
        return x * torch.where(rows.denoise, self.denoise_scale, self.encode_scale), (key, value), (ids, logits)


def _norm(d: ModelDescription, dtype: torch.dtype) -> nn.RMSNorm:
    return nn.RMSNorm(d.hidden_size, eps=d.rms_eps, dtype=dtype)
