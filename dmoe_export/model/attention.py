"""Grouped-query attention over cached and new keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..description import ModelDescription
from ..ops.torch_ops import attention
from .layers import rotate


class Attention(nn.Module):
    """Fused QKV → per-head RMSNorm, if any → rotary, maybe partial → attention → output projection (spec models.md)."""

    def __init__(self, d: ModelDescription, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = d.num_heads, d.num_kv_heads, d.head_dim
        self.qkv = nn.Linear(d.hidden_size, (d.num_heads + 2 * d.num_kv_heads) * d.head_dim, bias=d.qkv_bias,
                             dtype=dtype)
        self.q_norm = nn.RMSNorm(d.head_dim, eps=d.rms_eps, dtype=dtype) if d.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(d.head_dim, eps=d.rms_eps, dtype=dtype) if d.qk_norm else nn.Identity()
        self.out = nn.Linear(d.num_heads * d.head_dim, d.hidden_size, bias=False, dtype=dtype)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], bias: Tensor, past_key: Tensor,
                past_value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [N,H], bias [B,1,1,T or 1,S+T], past [B,Hkv,S,D] → output [N,H], new key and value [B,Hkv,T,D]; N = B·T."""
        rows, tokens = angles[0].shape[:2]
        # Along the last axis: there ONNX Runtime splits into three on CUDA without copying sizes from the host, which a
        # recorded step must not do.
        widths = [self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim]
        q, k, v = (part.reshape(rows, tokens, -1, self.head_dim) for part in self.qkv(x).split(widths, dim=1))
        q = rotate(self.q_norm(q), angles) * self.head_dim**-0.5
        key = rotate(self.k_norm(k), angles).transpose(1, 2)  # [B, Hkv, T, D]
        value = v.transpose(1, 2)
        # The query heads of one key head are stacked along the token axis, so keys are never repeated.
        share = self.heads // self.kv_heads
        q = q.unflatten(2, (self.kv_heads, share)).permute(0, 2, 3, 1, 4)  # [B, Hkv, share, T, D]
        q = q.reshape(rows, self.kv_heads, share * tokens, self.head_dim)
        mixed = attention(q, key, value, past_key, past_value, bias)
        mixed = mixed.unflatten(2, (share, tokens)).permute(0, 3, 1, 2, 4)  # [B, T, Hkv, share, D]
        return self.out(mixed.reshape(rows * tokens, self.heads * self.head_dim)), key, value
