"""What an expert consists of in the expert file: the tensors of the experts op, in its order (docs/bundle.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..bundle.manifest import Manifest
from ..ops.experts.fragments import Fragments

_DTYPES: dict[str | None, np.dtype[Any]] = {
    "fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16), "bf16": np.dtype(np.uint16)}  # bfloat16 as its bits


@dataclass(frozen=True)
class ExpertTensor:
    """A tensor [E, …] of one layer in the expert file; `slab`: bytes of an expert, `name`: in the graphs."""

    name: str
    offset: int
    slab: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


def expert_tensors(manifest: Manifest) -> list[list[ExpertTensor]]:
    """Per layer gate_up and down, and their scales where experts are quantised."""
    entry, model = manifest.experts, manifest.model
    assert entry is not None, "a dense model has no experts"
    experts, hidden, width = model.experts.num_experts, model.hidden_size, entry.stored_width
    stored, how = manifest.formats.experts, entry.quantisation
    dense = _DTYPES[stored if stored in _DTYPES else manifest.precision]  # of weights, or of integers' scales
    parts: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
        "gate_up": (dense, (experts, 2 * width, hidden)), "down": (dense, (experts, hidden, width))}
    if how:
        for part, (_, (_, rows, columns)) in list(parts.items()):
            parts[part] = np.dtype(np.uint8), (experts, rows, columns * how.bits // 8)
            parts[f"{part}_scales"] = dense, (experts, rows, columns // how.group_size)
    return [[ExpertTensor(f"layers.{layer.layer}.ffn.{part}", getattr(layer, f"{part}_offset"),
                          getattr(entry, f"{part}_slab_bytes"), dtype, shape)
             for part, (dtype, shape) in parts.items()] for layer in entry.layers]


def fragments_of(manifest: Manifest) -> dict[str, Fragments]:
    """How a GPU's kernels want quantised experts arranged, by name of tensor; nothing where they are floats."""
    how = manifest.quantisation
    if how is None:
        return {}
    return {tensor.name: Fragments(how.bits if tensor.dtype == np.uint8 else tensor.dtype.itemsize * 8,
                                   tensor.shape[-1] * tensor.dtype.itemsize)
            for layer in expert_tensors(manifest) for tensor in layer}
