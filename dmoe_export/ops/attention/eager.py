"""`DmoeAttention` in PyTorch; nothing is concatenated but the scores."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(q: Tensor, key: Tensor, value: Tensor, past_key: Tensor, past_value: Tensor, bias: Tensor) -> Tensor:
    """Arguments and result as in `SCHEMA`."""
    tokens, past = key.shape[2], past_key.shape[2]
    scores = torch.cat([q @ past_key.transpose(2, 3), q @ key.transpose(2, 3)], dim=-1)
    scores = scores.unflatten(2, (q.shape[2] // tokens, tokens)).float() + bias
    probs = torch.softmax(scores, dim=-1).to(q.dtype).flatten(2, 3)  # [B, Hkv, share·T, S+T]
    return probs[..., :past] @ past_value + probs[..., past:] @ value
