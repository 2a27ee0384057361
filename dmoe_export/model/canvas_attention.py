"""Attention of a model with a canvas: geometry by layer, and who sees whom by phase (spec diffusion_gemma.md)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..description import AttentionDescription, ModelDescription
from ..ops.self_attention.eager import rotate
from ..ops.torch_ops import attention


class CanvasAttention(nn.Module):
    """Fused QKV → RMSNorm of q, k (and v, without weight) per head → rotary → attention → output projection."""

    def __init__(self, d: ModelDescription, layer: int, dtype: torch.dtype) -> None:
        super().__init__()
        one = d.attention_of(layer)
        self.heads, self.kv_heads, self.head_dim = d.num_heads, one.num_kv_heads, one.head_dim
        self.scale, self.value_norm, self.eps = d.attention_scale or one.head_dim**-0.5, d.value_norm, d.rms_eps
        self.qkv = nn.Linear(d.hidden_size, (d.num_heads + 2 * one.num_kv_heads) * one.head_dim, bias=False,
                             dtype=dtype)
        self.q_norm = nn.RMSNorm(one.head_dim, eps=d.rms_eps, dtype=dtype)
        self.k_norm = nn.RMSNorm(one.head_dim, eps=d.rms_eps, dtype=dtype)
        self.out = nn.Linear(d.num_heads * one.head_dim, d.hidden_size, bias=False, dtype=dtype)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], bias: Tensor, past_key: Tensor,
                past_value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [N,H] → output [N,H], new key and value [B,Hkv,T,D]; N = B·T. Angles and bias are float32."""
        rows, tokens = angles[0].shape[:2]
        widths = [self.heads * self.head_dim, *2 * (self.kv_heads * self.head_dim,)]
        q, k, v = (part.reshape(rows, tokens, -1, self.head_dim) for part in self.qkv(x).split(widths, dim=1))
        q = (rotate(_normed(q, self.q_norm), *angles) * self.scale).to(x.dtype)
        key = rotate(_normed(k, self.k_norm), *angles).to(x.dtype).transpose(1, 2)  # [B, Hkv, T, D]
        if self.value_norm:
            v = F.rms_norm(v.float(), (self.head_dim,), None, self.eps).to(x.dtype)
        value = v.transpose(1, 2)
        # The query heads of one key head are stacked along the token axis, so keys are never repeated.
        share = self.heads // self.kv_heads
        q = q.unflatten(2, (self.kv_heads, share)).permute(0, 2, 3, 1, 4)  # [B, Hkv, share, T, D]
        mixed = attention(q.reshape(rows, self.kv_heads, share * tokens, self.head_dim), key, value, past_key,
                          past_value, bias)
        mixed = mixed.reshape(rows, self.kv_heads, share, tokens, self.head_dim).permute(0, 3, 1, 2, 4)
        return self.out(mixed.reshape(rows * tokens, self.heads * self.head_dim)), key, value


def canvas_bias(position_ids: Tensor, past_positions: Tensor, denoise: Tensor, window: int | None) -> Tensor:
    """Additive mask [B, 1, 1, T, S + T] in float32 of positions [B,T], [B,S] (−1 = none) and phases [B].

    Text sees what is not after it, of the last `window` positions with its own. A canvas sees all of itself and, of
    what is cached, `window` − 1 positions before its first one: the same for all its tokens.
    """
    keys = torch.cat([past_positions, position_ids], dim=1)[:, None, :]  # [B, 1, S + T]
    queries, phase = position_ids[:, :, None], denoise[:, None, None]
    seen = (keys >= 0) & ((keys <= queries) | phase)
    if window is not None:
        start = first_position(position_ids)[:, :, None]
        seen = seen & (keys > torch.where(phase, start, queries) - window)
    return torch.where(seen, 0.0, -1e30)[:, None, None]


def first_position(position_ids: Tensor) -> Tensor:
    """The least position of each row's tokens, [B, 1] of [B, T]; padding (−1) aside."""
    return torch.where(position_ids >= 0, position_ids, _FAR).amin(dim=1, keepdim=True)


def canvas_angles(position_ids: Tensor, one: AttentionDescription) -> tuple[Tensor, Tensor]:
    """Cosines and sines, [B, T, 1, R/2] each, or [B, T, 1, D/2] where frequencies spread over the head; float32."""
    width = one.head_dim if one.rotary_spread else one.rotary_dim
    pairs = torch.arange(0, width, 2, dtype=torch.float32, device=position_ids.device)
    frequencies = torch.where(pairs < one.rotary_dim, 1.0 / one.rope_theta ** (pairs / width), 0.0)
    angles = position_ids.clamp(min=0).float()[..., None] * frequencies
    return angles.cos()[:, :, None], angles.sin()[:, :, None]


_FAR = 2**40  # after every position


def _normed(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """In float32."""
    return F.rms_norm(x.float(), x.shape[-1:], norm.weight.float(), norm.eps)
