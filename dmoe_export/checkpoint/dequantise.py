"""What quantised storages mean, as arithmetic on tensors: float8 with scales, packed integers with zero points.

Results are float32 and exact up to the rounding of one product, which for packed integers with scales in half precision
does not round at all. Engines that run such checkpoints multiply in half precision, so theirs is the larger error.

Sources of the formats:
* float8: DeepSeek-V3 `inference/kernel.py` (weight_dequant) and transformers `integrations/finegrained_fp8.py`; a
  scale is *multiplied* with, also where its name ends in `_scale_inv`. compressed-tensors `lifecycle/forward.py`.
* GPTQ: AutoGPTQ `nn_modules/qlinear/qlinear_cuda.py`; GPTQModel `utils/model.py` on the two formats of zero points.
* AWQ: AutoAWQ `utils/packing_utils.py` and `modules/linear/gemm.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .quantised_storage import Block

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbouring columns lies in each nibble of a word, from the lowest."""


def float8(weight: Tensor, scales: Tensor, block: Block, first_row: int) -> Tensor:
    """Rows [n, K] of a float8 matrix that begin at `first_row`, times the scales of the whole: float32 [n, K].

    `scales` [⌈N/rows⌉, ⌈K/columns⌉]; the last block of an axis may be cut short.
    """
    rows, columns = block
    count, width = weight.shape
    places = torch.arange(first_row, first_row + count)
    chosen = scales.float()[places // rows if rows else torch.zeros_like(places)]
    spread = chosen.repeat_interleave(columns, 1)[:, :width] if columns else chosen
    return weight.float().mul_(spread)


def grid(shape: tuple[int, ...], block: Block) -> tuple[int, ...]:
    """Shape of the scales of a weight [..., N, K]."""
    *experts, rows, columns = shape
    return (*experts, *(-(-size // part) if part else 1 for size, part in zip((rows, columns), block, strict=True)))


def gptq_weights(words: Tensor, bits: int) -> Tensor:
    """int32 words [K·bits/32, n], inputs packed from the lowest bits up → integers [K, n]."""
    return _fields(words.unsqueeze(1), bits, dim=1).flatten(0, 1)


def gptq_zeros(words: Tensor, bits: int) -> Tensor:
    """int32 words [G, n·bits/32], outputs packed from the lowest bits up → integers [G, n]."""
    return _fields(words.unsqueeze(2), bits, dim=2).flatten(1, 2)


def awq_integers(words: Tensor) -> Tensor:
    """int32 words [rows, n/8], outputs packed in `AWQ_ORDER` → integers [rows, n]."""
    nibbles = _fields(words.unsqueeze(2), 4, dim=2)
    out = torch.empty_like(nibbles)
    out[:, :, list(AWQ_ORDER)] = nibbles
    return out.flatten(1, 2)


def _fields(words: Tensor, bits: int, dim: int) -> Tensor:
    """The fields of `bits` of each word along an axis of size 1."""
    shape = [1] * words.ndim
    shape[dim] = 32 // bits
    shifts = torch.arange(0, 32, bits, dtype=torch.int32).reshape(shape)
    return (words >> shifts) & ((1 << bits) - 1)


def grouped(integers: Tensor, zeros: Tensor, scales: Tensor, groups: Tensor) -> Tensor:
    """(q − zero) · scale: integers [K, n], zeros and scales [G, n], the group of each input [K] → float32 [n, K]."""
    return ((integers - zeros[groups]).float().mul_(scales.float()[groups])).T.contiguous()
