"""Weights of distinct experts, drawn once per process: every case of the same sizes uses the same ones.

Drawing them for each test anew took longer than the tests. Bits are drawn, not numbers: sign, mantissa and the last bit
of the exponent are random, so values lie in two binades around 1/√depth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch

from dmoe_export.ops.experts.fragments import scales_in_fragments, weights_in_fragments

TORCH = {"fp16": torch.float16, "bf16": torch.bfloat16}
_MANTISSA, _BIAS = {"fp16": 10, "bf16": 7}, {"fp16": 15, "bf16": 127}


def place() -> str:
    """Where references are computed: the machine's fastest place."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def to_words(values: np.ndarray, kind: str) -> np.ndarray:
    """Raw 16-bit words of float values, rounded to nearest even."""
    return torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(TORCH[kind]).view(torch.int16).numpy().view(
        np.uint16)


def halfs(words: np.ndarray, kind: str) -> torch.Tensor:
    """Raw words as what they are, at that place."""
    return torch.from_numpy(words.view(np.int16)).to(place()).view(TORCH[kind])  # converted there, not here


@dataclass(frozen=True)
class SlabsOf:
    """What decides the weights; `bits` 16 is a float type, else integers with a scale per `group` of a row."""

    kind: str
    hidden: int
    width: int
    number: int
    seed: int
    bits: int = 16
    group: int = 0

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Rows and depth of gate_up and down."""
        return (2 * self.width, self.hidden), (self.hidden, self.width)


class Slabs:
    """Weights of `of.number` experts; `stored`: as kernels read them, integers in fragment order."""

    def __init__(self, of: SlabsOf) -> None:
        self.of = of
        rng = np.random.default_rng((of.seed, 3))
        if of.bits == 16:
            self.stored = tuple(_draw(rng, (of.number, *shape), of.kind) for shape in of.shapes)
        else:
            packed = [rng.integers(0, 256, (of.number, rows, depth * of.bits // 8), np.uint8)
                      for rows, depth in of.shapes]
            steps = [rng.uniform(1, 3, (of.number, rows, depth // of.group)) / (2 ** (of.bits - 1) * math.sqrt(depth))
                     for rows, depth in of.shapes]
            scales = [to_words(step, of.kind) for step in steps]
            self._rows = list(zip(packed, scales, strict=True))
            self.stored = (*(weights_in_fragments(part, of.bits) for part in packed), *map(scales_in_fragments, scales))

    @cached_property
    def values(self) -> tuple[torch.Tensor, ...]:
        """gate_up [number, 2I', H] and down [number, H, I'] in the type, as the kernel has them before multiplying."""
        if self.of.bits == 16:
            return tuple(halfs(words, self.of.kind) for words in self.stored)
        return tuple(self._dequantised(*pair) for pair in self._rows)

    def _dequantised(self, packed: np.ndarray, scales: np.ndarray) -> torch.Tensor:
        steps, found = halfs(scales, self.of.kind), []
        for integers, step in zip(torch.from_numpy(packed).to(place()), steps, strict=True):
            if self.of.bits == 4:
                integers = torch.stack([integers & 15, integers >> 4], -1).flatten(-2)
            centred = integers.float() - 2 ** (self.of.bits - 1)
            found.append((centred * step.float().repeat_interleave(self.of.group, -1)).to(TORCH[self.of.kind]))
        return torch.stack(found)


@cache
def slabs_of(of: SlabsOf) -> Slabs:
    """The weights, drawn at the first call."""
    return Slabs(of)


def _draw(rng: np.random.Generator, shape: tuple[int, ...], kind: str) -> np.ndarray:
    """Words of numbers of a root mean square near 1/√depth."""
    bits = rng.integers(0, 1 << 16, shape, np.uint16)
    # Of the exponent e and e + 1 with e even: 2.4 · 2^(e − bias) is the root mean square of both.
    exponent = 2 * round((_BIAS[kind] - math.log2(2.4 * math.sqrt(shape[-1]))) / 2)
    return bits & np.uint16(0x8000 | (2 << _MANTISSA[kind]) - 1) | np.uint16(exponent << _MANTISSA[kind])
