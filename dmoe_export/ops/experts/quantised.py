"""Weights as integers and back, in PyTorch: symmetric, one scale per group along the last axis (package docstring).

Rounding to nearest. A group's scale is the best, by squared error, of a few that leave no value further than half a
scale from what stands for it. Scales have a sign: integers reach to −2^(bits−1) and only to 2^(bits−1) − 1, so the
group's largest value is put on the longer side (as ggml's Q4_0 does), which makes the error of 4 bits 15 % smaller.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...weight_formats import ExpertQuantisation

# The group's largest magnitude is put at 2^(bits−1) + one of these.
# The first is always allowed: it is what the shorter side takes.
_REACHES = (-1.0, -0.5, 0.0, 0.5)
# Values rounded at a time: the many passes over them stay in the cache, and PyTorch does not share less than 2^15 among
# threads, whose barriers cost more than the work (on a busy machine ten times as much).
_CHUNK = (1 << 15) - 1
_ROUND = 1.5 * 2**23  # float32 has no halves beyond it; torch.round shares even little work among threads


def quantise(weight: Tensor, how: ExpertQuantisation, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`weight` [..., C] → packed uint8 [..., C·bits/8] and scales [..., C/G]; G must divide C, values be finite.

    |weight − value| ≤ |scale| / 2, unless the scale is below the least normal number of its type; zeros stay zeros.
    """
    top, groups = 1 << (how.bits - 1), weight.float().reshape(-1, how.group_size)
    chosen = [_rounded(part, top, scale_dtype) for part in groups.split(_CHUNK // how.group_size)]
    stored = torch.cat([integers for integers, _ in chosen]).reshape(weight.shape)
    scales = torch.cat([scale for _, scale in chosen]).to(scale_dtype)
    return (stored if how.bits == 8 else _pack(stored)), scales.reshape(*weight.shape[:-1], -1)


def _rounded(groups: Tensor, top: int, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Groups [n, G] → integers plus `top`, uint8 [n, G], and scales [n, 1], float32."""
    high, low = groups.amax(-1, keepdim=True), groups.amin(-1, keepdim=True)
    largest, opposite = torch.maximum(high, -low), torch.minimum(high, -low)
    sign = torch.where(high > -low, -1.0, 1.0)
    best, best_scale, best_error = groups, largest, largest
    for reach in _REACHES:
        size = (largest / (top + reach)).to(scale_dtype).float()
        scale = sign * size
        integers = (groups / torch.where(size == 0, 1.0, scale)).add_(_ROUND).sub_(_ROUND).clamp_(-top, top - 1)
        # In float64: a choice that depended on the order of a sum would differ from machine to machine.
        error = (integers * scale).sub_(groups).double().square_().sum(-1, keepdim=True)
        better = (opposite <= (top - 0.5) * size) & (largest <= (top + 0.5) * size) & (error < best_error)
        if reach == _REACHES[0]:
            better = torch.ones_like(better)
        best, best_scale, best_error = (torch.where(better, new, old) for new, old in (
            (integers, best), (scale, best_scale), (error, best_error)))
    return (best + top).to(torch.uint8), best_scale


def dequantise(packed: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Packed uint8 [..., C·bits/8] and scales [..., C/G] → float32 [..., C]."""
    stored = packed if bits == 8 else _unpack(packed)
    groups = stored.unflatten(-1, (scales.shape[-1], -1)).float() - (1 << (bits - 1))
    return (groups * scales.float()[..., None]).flatten(-2)


def _pack(values: Tensor) -> Tensor:
    """uint8 below 16 [..., C] → two to a byte [..., C/2], the even index low."""
    return values[..., 0::2] | (values[..., 1::2] << 4)


def _unpack(packed: Tensor) -> Tensor:
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
