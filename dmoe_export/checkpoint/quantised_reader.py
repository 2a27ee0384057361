"""A reader above the reader: a checkpoint's quantised weights as the float32 tensors they stand for.

Which tensors belong to a weight is told by their names and stored types, and the rest by the config's `Storage`. Lists
of modules that are not quantised (`modules_to_not_convert`, `ignored_layers`, `ignore`) are not asked: a weight that is
stored as floats is read as it stands, and one that is not must have its scales.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..words import count
from . import float8_weights, packed_weights
from .quantised_storage import Float8, Storage, read_storage
from .reader import FLOATS, CheckpointReader, TensorReader, unexplained
from .stored_parts import PIECE


def open_tensors(folder: Path, config: dict[str, Any]) -> TensorReader:
    """The tensors of a checkpoint as floats; quantised ones are dequantised while they are read.

    Raises CheckpointError for a storage that is not read, before any value is.
    """
    stored, storage = CheckpointReader(folder), read_storage(folder, config)
    if storage is None:
        stored.require_floats()
        return stored
    return DequantisingReader(stored, storage)


class DequantisingReader(TensorReader):
    """Shows `X.weight` in float32 where the files have float8 or packed integers; the rest as stored."""

    def __init__(self, stored: CheckpointReader, storage: Storage) -> None:
        super().__init__(stored.folder)
        found = (float8_weights.find(stored, storage) if isinstance(storage, Float8)
                 else packed_weights.find(stored, storage))
        if not found.made:
            raise CheckpointError(f"The config in {self.folder} says that weights are quantised ({storage.method}), "
                                  "and none is; remove what it says, or fetch the weights it belongs to.")
        self._stored, self._made = stored, found.made
        self.warnings = [*stored.warnings, f"The checkpoint holds {count(len(found.made), 'quantised tensor')} "
                         f"({storage.method}), read as the float32 values they stand for.", *found.warnings]
        for name, tensor in stored.stored.items():
            if name in found.used:
                continue
            if tensor.dtype not in FLOATS:
                raise unexplained(name, tensor, f"its quantisation ({storage.method}) does not say what that means")
            self._shapes[name] = tensor.shape
        self._shapes |= {name: made.shape for name, made in found.made.items()}

    def stored_type(self, name: str) -> str:
        """As in TensorReader: quantised weights come as float32."""
        return "F32" if name in self._made else self._stored.stored_type(name)

    def close(self) -> None:
        """Unmap the open shard."""
        self._stored.close()

    def read(self, name: str, index: int | slice | None = None) -> Tensor:
        """As in TensorReader; float32 where the weight is quantised, else as stored."""
        made = self._made.get(name)
        if made is None:
            self.shape(name)
            return self._stored.read(name, index)
        if isinstance(index, int):
            return self.read(name, slice(index, index + 1))[0]
        first, last, _ = (index or slice(None)).indices(made.shape[0])
        out = torch.empty((max(0, last - first), *made.shape[1:]))
        step = max(1, PIECE // max(1, torch.Size(made.shape[1:]).numel()))
        for start in range(first, last, step):
            end = min(start + step, last)
            out[start - first:end - first] = made.rows(start, end)
        self.refuse_not_finite(name, out, made.file)
        return out
