"""A float tensor that several stored tensors stand for, and the checks that its parts are there and fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ..errors import CheckpointError
from .reader import CheckpointReader

PIECE = 4 << 20
"""Values dequantised at a time: several arrays of this size are in memory meanwhile."""


@dataclass(frozen=True)
class MadeTensor:
    """A tensor of this shape; `rows(first, last)` makes a part of it along the first axis, in float32."""

    shape: tuple[int, ...]
    file: Path
    rows: Callable[[int, int], Tensor]


@dataclass
class Found:
    """What a storage explains of a checkpoint's stored tensors."""

    made: dict[str, MadeTensor] = field(default_factory=dict)  # by the name of the float tensor
    used: set[str] = field(default_factory=set)  # stored tensors that are parts of these
    warnings: list[str] = field(default_factory=list)


def take(stored: CheckpointReader, method: str, owner: str, name: str, types: tuple[str, ...]) -> tuple[int, ...]:
    """The shape of the part `name` of a quantised tensor `owner`, which must exist and have one of the types."""
    tensor = stored.stored.get(name)
    if tensor is None:
        raise CheckpointError(f"Tensor {owner} in {stored.folder} is quantised ({method}) and its part {name} is "
                              "missing; fetch the checkpoint again.")
    if tensor.dtype not in types:
        raise CheckpointError(f"Tensor {name} in {tensor.file} is stored as {tensor.dtype}, expected "
                              f"{' or '.join(types)} for {method}; fetch the checkpoint again.")
    return tensor.shape


def contradiction(stored: CheckpointReader, method: str, name: str, wanted: str) -> CheckpointError:
    """The refusal of a shape that the quantisation's config does not explain."""
    return CheckpointError(f"Tensor {name} in {stored.folder} has shape {list(stored.shape(name))}, but quantisation "
                           f"{method} as configured asks for {wanted}; its config belongs to other weights.")
