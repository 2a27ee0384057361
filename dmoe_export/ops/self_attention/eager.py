"""`DmoeSelfAttention` in PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.eager import attention


def self_attention(qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, past_positions: Tensor,
                   past_key: Tensor, past_value: Tensor, q_norm: Tensor | None = None, k_norm: Tensor | None = None, *,
                   block_length: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as in `NORMED_SCHEMA`; no norms, no norm."""
    rows, tokens = position_ids.shape
    kv_heads, head_dim = past_key.shape[1], past_key.shape[3]
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    widths = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    q, k, v = (part.reshape(rows, tokens, -1, head_dim) for part in qkv.split(widths, dim=1))
    q = (rotate(_normed(q, q_norm, eps), cos, sin) * head_dim**-0.5).to(qkv.dtype)
    key = rotate(_normed(k, k_norm, eps), cos, sin).to(qkv.dtype).transpose(1, 2)  # [B, Hkv, T, D]
    value = v.transpose(1, 2)
    # The query heads of one key head are stacked along the token axis, so keys are never repeated.
    share = heads // kv_heads
    q = q.unflatten(2, (kv_heads, share)).permute(0, 2, 3, 1, 4)  # [B, Hkv, share, T, D]
    q = q.reshape(rows, kv_heads, share * tokens, head_dim)
    keys_at = torch.cat([past_positions, position_ids], dim=1)
    mixed = attention(q, key, value, past_key, past_value, attention_bias(position_ids, keys_at, block_length))
    mixed = mixed.unflatten(2, (share, tokens)).permute(0, 3, 1, 2, 4)  # [B, T, Hkv, share, D]
    return mixed.reshape(rows * tokens, heads * head_dim), key, value


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate-half rotary on the first dimensions of x [B, T, heads, D]; the rest passes (partial rotary)."""
    half = cos.shape[-1]
    left, right, rest = x[..., :half], x[..., half:2 * half], x[..., 2 * half:]
    return torch.cat([left * cos - right * sin, right * cos + left * sin, rest], dim=-1)


def attention_bias(position_ids: Tensor, key_positions: Tensor, block_length: int) -> Tensor:
    """Additive mask [B, 1, 1, T or 1, keys] in float32: 0 where a token sees a place, −1e30 where it does not.

    Finite, so that the rows of padded queries stay free of NaN.
    """
    seen = (key_positions >= 0)[:, None, :]  # [B, 1, keys]
    if block_length:
        query_block = torch.div(position_ids.clamp(min=0), block_length, rounding_mode="trunc")[:, :, None]
        key_block = torch.div(key_positions.clamp(min=0), block_length, rounding_mode="trunc")[:, None, :]
        seen = (key_block <= query_block) & seen
    return torch.where(seen, 0.0, -1e30)[:, None, None]


def _normed(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """In float32."""
    return x.float() if weight is None else F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps)
