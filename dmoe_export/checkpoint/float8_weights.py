"""Float8 weights of a checkpoint: X and its scale X_scale_inv or X_scale; X ends in `.weight` or is merged experts.

A scale may be one for a matrix, one for each of its rows, or one for a block; the shape tells which, among those that
the config allows. Merged experts [E, N, K] have one more axis, or one scale for all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import CheckpointError
from .dequantise import float8, grid
from .quantised_storage import Block, Float8
from .reader import FLOATS, CheckpointReader
from .stored_parts import PIECE, Found, MadeTensor, contradiction, take

_SCALE_TYPES = (*FLOATS, "F8_E8M0")  # the last: powers of two
_OF_ACTIVATIONS = (".input_scale", ".activation_scale", "_input_scale", "_activation_scale")
_ONE = ((), (1,))  # shapes of a scale that is alone


def find(stored: CheckpointReader, how: Float8) -> Found:
    """All float8 weights with their scales; a scale without such a weight is a CheckpointError, and the reverse."""
    found = Found()
    for name, tensor in stored.stored.items():
        if tensor.dtype == "F8_E4M3":
            scale = _scale_name(stored, name, how)
            found.made[name] = _weight(stored, name, scale, how)
            found.used |= {name, scale}
    idle = 0
    for name in stored.names:
        activations = _owner(name, _OF_ACTIVATIONS)
        owner = _owner(name, how.suffixes)
        if activations is not None and {activations, f"{activations}.weight"} & found.made.keys():
            found.used.add(name)
            idle += 1
        elif owner is not None and name not in found.used:
            raise CheckpointError(f"Tensor {name} in {stored.folder} is a scale, and {owner} is not stored as F8_E4M3; "
                                  "fetch the checkpoint again.")
    if idle:
        found.warnings.append(f"The checkpoint's {idle} scales of activations are not used: weights are dequantised, "
                              "and activations are not quantised.")
    return found


def _owner(name: str, suffixes: tuple[str, ...]) -> str | None:
    return next((name.removesuffix(suffix) for suffix in suffixes if name.endswith(suffix)), None)


def _scale_name(stored: CheckpointReader, name: str, how: Float8) -> str:
    names = [name + suffix for suffix in how.suffixes]
    there = [scale for scale in names if scale in stored]
    if len(there) > 1:
        raise CheckpointError(f"Tensor {name} in {stored.folder} has two scales, {there[0]} and {there[1]}; fetch the "
                              "checkpoint again.")
    return (there or names)[0]


def _weight(stored: CheckpointReader, name: str, scale: str, how: Float8) -> MadeTensor:
    shape, given = stored.shape(name), take(stored, how.method, name, scale, _SCALE_TYPES)
    if len(shape) not in (2, 3):
        raise contradiction(stored, how.method, name, "two or three axes")
    block = next((block for block in how.blocks if given in _shapes(grid(shape, block))), None)
    if block is None:
        raise contradiction(stored, how.method, scale, " or ".join(str(list(grid(shape, b))) for b in how.blocks))
    wanted = grid(shape, block)[-2:]

    def matrix(first: int, last: int) -> Tensor:
        return float8(stored.raw(name, slice(first, last)), stored.raw(scale).reshape(wanted), block, first)

    def experts(first: int, last: int) -> Tensor:
        return torch.stack([_expert(stored, name, expert, _of_expert(stored, scale, expert, wanted), block)
                            for expert in range(first, last)])

    return MadeTensor(shape, stored.stored[name].file, matrix if len(shape) == 2 else experts)


def _shapes(wanted: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Shapes that a scale of this grid is stored in: axes of size 1 may be left out, experts may share one."""
    shapes = [wanted]
    if wanted[-1] == 1:
        shapes.append(wanted[:-1])
    if wanted[-2:] == (1, 1):
        shapes += [wanted[:-2], *_ONE]
    return shapes


def _of_expert(stored: CheckpointReader, scale: str, expert: int, wanted: tuple[int, ...]) -> Tensor:
    shared = stored.shape(scale) in _ONE
    return (stored.raw(scale) if shared else stored.raw(scale, expert)).reshape(wanted)


def _expert(stored: CheckpointReader, name: str, expert: int, scales: Tensor, block: Block) -> Tensor:
    """One matrix of merged ones, in pieces."""
    _, count, width = stored.shape(name)
    out = torch.empty(count, width)
    step = max(1, PIECE // width)
    for first in range(0, count, step):
        raw = stored.raw(name, slice(expert, expert + 1), slice(first, min(first + step, count)))[0]
        out[first:first + step] = float8(raw, scales, block, first)
    return out
