"""Drawing words inside the graph: the inverse of the cumulative distribution, first of blocks of words, then in one.

Sums up to every word would be as large as the logits, and ONNX Runtime's CUDA provider adds up each of them anew: work
with the square of their number. Two short rows of sums need neither, and round less.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

_BLOCK = 512  # words, where the vocabulary is a multiple of it


def block_sums(weights: Tensor) -> Tensor:
    """Sums [B,M,K] of weights [B,M,V] over blocks of V / K words."""
    return weights.unflatten(-1, (-1, math.gcd(weights.shape[-1], _BLOCK))).sum(-1)


def draw(sums: Tensor, uniform: Tensor, source: Tensor, weigh: Callable[[Tensor], Tensor]) -> Tensor:
    """Ids [B,M]: the first word up to which weights sum to more than the share `uniform` [B,M] of all.

    `sums`: `block_sums` of the weights. `weigh` makes weights of `source` [B,M,V], for the block that is looked into:
    so an engine never stores them all. Shares are below 1, so a word that weighs nothing is never drawn.
    """
    size = source.shape[-1] // sums.shape[-1]
    upto = sums.cumsum(-1)
    share = uniform[..., None] * upto[..., -1:]  # of the sum as it was rounded
    block = _below(upto, share)
    before = torch.where(upto <= share, upto, 0.0).amax(dim=-1, keepdim=True)
    chosen = block[..., None, None].expand(-1, -1, -1, size)
    inside = weigh(source.unflatten(-1, (-1, size)).gather(-2, chosen)[:, :, 0]).cumsum(-1)  # [B, M, V / K]
    # The block's own sum may be rounded to less than what is left of the share. No factor 1 − 2⁻²⁴, which torch.onnx's
    # optimizer takes for 1 and drops.
    rest = torch.minimum(share - before, inside[..., -1:] - inside[..., -1:] * 2**-24)
    return block * size + _below(inside, rest)


def _below(rising: Tensor, share: Tensor) -> Tensor:
    """How many of the last axis are not above the share, at most all but one; counted in float32, exact up to 2²⁴."""
    return (rising <= share).sum(-1, dtype=torch.float32).long().clamp(max=rising.shape[-1] - 1)
