"""Grouped-query attention over cached and new keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..description import ModelDescription
from ..ops.torch_ops import self_attention


class Attention(nn.Module):
    """Fused QKV → per-head RMSNorm, if any → rotary, maybe partial → attention → output projection (spec models.md)."""

    def __init__(self, d: ModelDescription, block_length: int, dtype: torch.dtype) -> None:
        """`block_length` of a block-causal model; full attention takes no notice of it."""
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = d.num_heads, d.num_kv_heads, d.head_dim
        self.block_length, self.eps = 0 if d.attention == "full" else block_length, d.rms_eps
        self.qkv = nn.Linear(d.hidden_size, (d.num_heads + 2 * d.num_kv_heads) * d.head_dim, bias=d.qkv_bias,
                             dtype=dtype)
        self.q_norm = nn.RMSNorm(d.head_dim, eps=d.rms_eps, dtype=dtype) if d.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(d.head_dim, eps=d.rms_eps, dtype=dtype) if d.qk_norm else nn.Identity()
        self.out = nn.Linear(d.num_heads * d.head_dim, d.hidden_size, bias=False, dtype=dtype)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], positions: tuple[Tensor, Tensor], past_key: Tensor,
                past_value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [N,H] → output [N,H], new key and value [B,Hkv,T,D]; N = B·T.

        Angles are float32; positions [B,T] and of the past [B,S], past [B,Hkv,S,D].
        """
        norms = tuple(norm.weight for norm in (self.q_norm, self.k_norm) if isinstance(norm, nn.RMSNorm))
        mixed, key, value = self_attention(self.qkv(x), *angles, *positions, past_key, past_value, norms,
                                           block_length=self.block_length, eps=self.eps)
        return self.out(mixed), key, value
