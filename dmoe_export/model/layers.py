"""The small parts: feed-forward, rotary positions, attention mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FeedForward(nn.Module):
    """Dense SwiGLU: down(silu(gate(x)) ⊙ up(x)); also the shared experts."""

    def __init__(self, hidden: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, width, bias=False, dtype=dtype)
        self.up = nn.Linear(hidden, width, bias=False, dtype=dtype)
        self.down = nn.Linear(width, hidden, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[N, H] → [N, H]."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


def rotary_angles(position_ids: Tensor, theta: float, rotary_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines, [B, T, 1, rotary_dim/2] each, computed in float32."""
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=position_ids.device) / rotary_dim
    angles = position_ids.clamp(min=0).float()[..., None] * (1.0 / theta**exponents)
    return angles.cos().to(dtype)[:, :, None], angles.sin().to(dtype)[:, :, None]


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate-half rotary on the first dims of x [B, T, heads, D]; the rest passes (partial rotary)."""
    cos, sin = angles
    half = cos.shape[-1]
    left, right, rest = x[..., :half], x[..., half:2 * half], x[..., 2 * half:]
    return torch.cat([left * cos - right * sin, right * cos + left * sin, rest], dim=-1)


def attention_bias(position_ids: Tensor, key_positions: Tensor, block_length: int) -> Tensor:
    """Additive block-causal mask [B, 1, 1, T, keys] in float32: a block sees earlier blocks and itself, never padding.

    Finite, so that the rows of padded queries stay free of NaN.
    """
    query_block = torch.div(position_ids.clamp(min=0), block_length, rounding_mode="trunc")[:, :, None]
    key_block = torch.div(key_positions.clamp(min=0), block_length, rounding_mode="trunc")[:, None, :]
    seen = (key_block <= query_block) & (key_positions >= 0)[:, None, :]  # [B, T, keys]
    return torch.where(seen, 0.0, -1e30)[:, None, None]


def full_bias(key_positions: Tensor) -> Tensor:
    """Additive mask [B, 1, 1, 1, keys] in float32 of a full-canvas model: everyone sees every key but padding."""
    return torch.where(key_positions >= 0, 0.0, -1e30)[:, None, None, None]
