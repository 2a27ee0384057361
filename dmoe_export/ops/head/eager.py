"""`DmoeHead` in PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def head(hidden: Tensor, norm: Tensor, weight: Tensor, logit_rows: Tensor, logits_kept: Tensor, *, eps: float,
         mask_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as in `SCHEMA`."""
    rows = wanted(hidden, logit_rows, hidden.shape[0] // max(1, logit_rows.shape[0]))
    logits = F.linear(F.rms_norm(rows, norm.shape, norm, eps), weight.to(hidden.dtype)).float()
    logits = logits.reshape(*logit_rows.shape, weight.shape[0])
    token_ids, confidence = best_tokens(logits, mask_id)
    return token_ids, confidence, logits[:, :logits_kept.shape[0]]


def wanted(hidden: Tensor, logit_rows: Tensor, tokens: int) -> Tensor:
    """Rows [B·M, H] of hidden [N, H], N = B·tokens."""
    rows = logit_rows.shape[0]
    # First tokens of the rows, without a factor from the host: that would be a copy to the device in every step.
    first = torch.arange(hidden.shape[0], device=hidden.device).reshape(rows, tokens)[:, :1]
    return hidden[(first + logit_rows.clamp(min=0)).flatten()]


def best_tokens(logits: Tensor, mask_id: int) -> tuple[Tensor, Tensor]:
    """Best token [B,M] and its probability [B,M] from logits [B,M,V]; the mask token is never an answer (−1: none)."""
    # A bias made of V values and added: choosing between M·V values would cost ONNX Runtime ten times as much.
    bias = torch.where(torch.arange(logits.shape[-1]) == mask_id, float("-inf"), 0.0) if mask_id >= 0 else None
    allowed = logits if bias is None else logits + bias
    best, token_ids = allowed.max(dim=-1)
    return token_ids, 1.0 / torch.exp(allowed - best[..., None]).sum(-1)
