"""The small parts: feed-forward, the shared expert, rotary positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.experts import Activation
from ..ops.experts.eager import activate
from ..ops.mixture.eager import shared_expert
from ..ops.torch_ops import add_norm


class FeedForward(nn.Module):
    """Dense gated feed-forward: down(act(gate(x)) ⊙ up(x)), act silu (SwiGLU) or gelu_tanh."""

    def __init__(self, hidden: int, width: int, dtype: torch.dtype, activation: Activation = "silu") -> None:
        super().__init__()
        self.activation = activation
        self.gate = nn.Linear(hidden, width, bias=False, dtype=dtype)
        self.up = nn.Linear(hidden, width, bias=False, dtype=dtype)
        self.down = nn.Linear(width, hidden, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[N, H] → [N, H]."""
        return self.down(activate(self.gate(x), self.activation) * self.up(x))


class AddNorm(nn.Module):
    """What is added to the residual stream, and the RMSNorm behind it."""

    def __init__(self, hidden: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(hidden, dtype=dtype)), eps

    def forward(self, x: Tensor, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x, delta [N,H] → their sum and its norm [N,H]."""
        if delta is None:
            return x, F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return add_norm(x, delta, self.weight, self.eps)


class SharedExpert(nn.Module):
    """The expert that every token takes: SwiGLU with all gate rows above all up rows in one matrix."""

    def __init__(self, hidden: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden, 2 * width, bias=False, dtype=dtype)
        self.down = nn.Linear(width, hidden, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[N, H] → [N, H]."""
        return shared_expert(x, self.gate_up.weight, self.down.weight)


def rotary_angles(position_ids: Tensor, theta: float, rotary_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines, [B, T, 1, rotary_dim/2] each, computed in float32."""
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=position_ids.device) / rotary_dim
    angles = position_ids.clamp(min=0).float()[..., None] * (1.0 / theta**exponents)
    return angles.cos().to(dtype)[:, :, None], angles.sin().to(dtype)[:, :, None]
