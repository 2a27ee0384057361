"""Lazy access to the tensors of a checkpoint folder: one or many safetensors files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .safetensors_index import StoredTensor, locate, open_shard

FLOATS = ("F64", "F32", "F16", "BF16")
"""Stored types that are numbers as they stand; any other means something only with its scales."""
_CHUNK_BYTES = 64 << 20
# Pages of a memory-mapped shard count as this process's memory until the map is closed.
_REOPEN_BYTES = 256 << 20


class TensorReader(ABC):
    """Float tensors by name; nothing is read before it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.warnings: list[str] = []  # for whoever exports the checkpoint
        self._shapes: dict[str, tuple[int, ...]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    @property
    def names(self) -> list[str]:
        """All tensor names."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; a missing one is an error that names the folder."""
        if name not in self._shapes:
            raise CheckpointError(f"Tensor {name} is missing in {self.folder}; the checkpoint is incomplete or of "
                                  "another family.")
        return self._shapes[name]

    def expect(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise unless the tensor exists with this shape."""
        if self.shape(name) != shape:
            raise CheckpointError(f"Tensor {name} in {self.folder} has shape {list(self.shape(name))}, but config.json "
                                  f"asks for {list(shape)}.")

    @abstractmethod
    def read(self, name: str, index: int | slice | None = None) -> Tensor:
        """One tensor, or its part along the first axis (an int drops the axis), on the CPU."""

    @abstractmethod
    def stored_type(self, name: str) -> str:
        """The type its values come in, by safetensors' name: F32, F16, BF16, F64."""

    @abstractmethod
    def close(self) -> None:
        """Give back what is open; reading opens it again."""

    def chunks(self, name: str) -> Iterator[Tensor]:
        """A tensor in order, in pieces of rows of at most 64 MiB (or one row)."""
        shape = self.shape(name)
        row = max(1, torch.Size(shape[1:]).numel()) * 4
        step = max(1, _CHUNK_BYTES // row)
        for start in range(0, shape[0], step):
            yield self.read(name, slice(start, min(start + step, shape[0])))

    def refuse_not_finite(self, name: str, tensor: Tensor, place: Path) -> None:
        """Raise if a value of a tensor's part is NaN or infinite."""
        if not all_finite(tensor):
            raise CheckpointError(f"Tensor {name} in {place} holds NaN or infinity; the checkpoint is damaged.")


class CheckpointReader(TensorReader):
    """Tensors as they are stored; no shard stays mapped for long.

    `require_floats` must hold before their values are used as numbers.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.stored, self.warnings = locate(folder)
        self._shapes = {name: tensor.shape for name, tensor in self.stored.items()}
        self._open_path: Path | None = None
        self._open_file: Any = None
        self._read_since_open = 0

    def require_floats(self) -> None:
        """Raise for the first tensor that is not stored as floating-point numbers."""
        for name, tensor in self.stored.items():
            if tensor.dtype not in FLOATS:
                raise unexplained(name, tensor, "config.json has no quantization_config that says what that means")

    def close(self) -> None:
        """Unmap the open shard."""
        self._open_path, self._open_file, self._read_since_open = None, None, 0

    def read(self, name: str, index: int | slice | None = None) -> Tensor:
        """As in TensorReader, as stored."""
        tensor = self.raw(name) if index is None else self.raw(name, index)
        self.refuse_not_finite(name, tensor, self.stored[name].file)
        return tensor

    def stored_type(self, name: str) -> str:
        """As in TensorReader."""
        return self.stored[name].dtype

    def raw(self, name: str, *index: int | slice) -> Tensor:
        """A tensor or its part along the first axes, as stored, whatever its type and values."""
        self.shape(name)
        handle = self._handle(self.stored[name].file)
        tensor = handle.get_slice(name)[index] if index else handle.get_tensor(name)
        tensor = tensor.clone()  # the slice may alias the map, which is closed soon
        self._read_since_open += tensor.nbytes
        return tensor

    def _handle(self, shard: Path) -> Any:
        if self._open_path != shard or self._read_since_open > _REOPEN_BYTES:
            self.close()
            self._open_file = open_shard(shard)
            self._open_path = shard
        return self._open_file


def unexplained(name: str, tensor: StoredTensor, why: str) -> CheckpointError:
    """The refusal of a stored type."""
    return CheckpointError(f"Tensor {name} in {tensor.file} is stored as {tensor.dtype}, and {why}; take a checkpoint "
                           f"in {', '.join(FLOATS[1:])}, or one with its quantisation's config and scales.")


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite: by the extremes, which NaN spoils too, as that is many times as fast."""
    if not tensor.numel() or not tensor.is_floating_point():
        return bool(torch.isfinite(tensor).all())
    return bool(torch.isfinite(torch.stack(tensor.aminmax())).all())
