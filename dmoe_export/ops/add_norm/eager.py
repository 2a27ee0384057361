"""`DmoeAddNorm` in PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def add_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Arguments and results as in `SCHEMA`."""
    total = x + delta
    return total, F.rms_norm(total, weight.shape, weight, eps)
