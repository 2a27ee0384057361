"""Lazy access to the tensors of a checkpoint folder: one or many safetensors files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError

_CHUNK_BYTES = 64 << 20
# Pages of a memory-mapped shard count as this process's memory until the map is closed.
_REOPEN_BYTES = 256 << 20


def read_config(folder: Path) -> dict[str, Any]:
    """The checkpoint's config.json."""
    return _read_json(folder / "config.json")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; give the folder of a Hugging Face checkpoint.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object; it is not a checkpoint's file.")
    return value


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite: by the extremes, which NaN spoils too, as that is many times as fast."""
    if not tensor.numel() or not tensor.is_floating_point():
        return bool(torch.isfinite(tensor).all())
    return bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


class CheckpointReader:
    """Tensors by name; nothing is read before it is asked for, and no shard stays mapped for long."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._shards = self._find_shards()
        self._open_path: Path | None = None
        self._open_file: Any = None
        self._read_since_open = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._where: dict[str, Path] = {}
        for shard in self._shards:
            handle = self._handle(shard)
            for name in handle.keys():  # noqa: SIM118 - not a dict
                self._where[name] = shard
                self._shapes[name] = tuple(handle.get_slice(name).get_shape())
        self.close()

    def _find_shards(self) -> list[Path]:
        index = self.folder / "model.safetensors.index.json"
        if index.exists():
            weight_map = _read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
                raise CheckpointError(f"{index} has no weight_map of tensor names to files; fetch it again.")
            names = sorted(set(weight_map.values()))
            for name in names:
                if not (self.folder / name).is_file():
                    raise CheckpointError(f"Shard {self.folder / name} is missing, though {index.name} lists it; "
                                          "fetch the checkpoint again.")
        else:
            names = sorted(p.name for p in self.folder.glob("*.safetensors"))
        if not names:
            raise CheckpointError(f"{self.folder} holds no *.safetensors file; only safetensors checkpoints are read.")
        return [self.folder / name for name in names]

    def _handle(self, shard: Path) -> Any:
        if self._open_path != shard or self._read_since_open > _REOPEN_BYTES:
            self.close()
            try:
                shard.open("rb").close()  # safe_open calls an unreadable file missing
                self._open_file = safe_open(shard, framework="pt")
            except OSError as error:
                raise CheckpointError(f"Shard {shard} cannot be read: {error.strerror}.") from None
            except SafetensorError as error:
                raise CheckpointError(f"Shard {shard} is truncated or damaged ({error}); fetch it again.") from None
            self._open_path = shard
        return self._open_file

    def close(self) -> None:
        """Unmap the open shard."""
        self._open_path, self._open_file, self._read_since_open = None, None, 0

    def __contains__(self, name: str) -> bool:
        return name in self._where

    @property
    def names(self) -> list[str]:
        """All tensor names."""
        return list(self._where)

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

    def read(self, name: str, index: int | slice | None = None) -> Tensor:
        """One tensor, or its part along the first axis (an int drops the axis), on the CPU as stored."""
        self.shape(name)
        handle = self._handle(self._where[name])
        part = handle.get_slice(name)
        tensor = part[:] if index is None else part[index]
        tensor = tensor.clone()  # the slice may alias the map, which is closed soon
        self._read_since_open += tensor.nbytes
        if not all_finite(tensor):
            raise CheckpointError(f"Tensor {name} in {self._where[name]} holds NaN or infinity; the checkpoint is "
                                  "damaged.")
        return tensor

    def chunks(self, name: str) -> Iterator[Tensor]:
        """A tensor in order, in pieces of rows of at most 64 MiB (or one row)."""
        shape = self.shape(name)
        row = max(1, torch.Size(shape[1:]).numel()) * 4
        step = max(1, _CHUNK_BYTES // row)
        for start in range(0, shape[0], step):
            yield self.read(name, slice(start, min(start + step, shape[0])))
