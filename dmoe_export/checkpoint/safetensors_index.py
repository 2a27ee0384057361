"""Which file of a checkpoint folder holds which tensor: the index decides, and two sets of weights are an error.

The rules, stricter than those of transformers (which takes model.safetensors before any index, and of a name in two
shards the one it happens to read last):

* With an index (`*.safetensors.index.json`), exactly the tensors of its weight_map count, each in the file it names.
  Any other safetensors file beside it is a second set of weights.
* Without one, all safetensors files together are the checkpoint, and no name may be in two of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError
from ..guards.regular_file import MOST_TABLE, check_regular
from ..words import count
from .config_fields import shown
from .json_file import read_json

_OTHER_FORMATS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.npz", "*.msgpack", "*.h5")

_MOST_NAME = 1000  # characters of a tensor's or a file's name


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies, and what the file's header says of it."""

    file: Path
    dtype: str  # safetensors' name: F32, BF16, F8_E4M3, I32, …
    shape: tuple[int, ...]


def open_shard(shard: Path) -> Any:
    """A safetensors file, mapped; what cannot be read is a CheckpointError."""
    try:
        check_regular(shard)
        shard.open("rb").close()  # safe_open calls an unreadable file missing
        return safe_open(shard, framework="pt")
    except OSError as error:
        raise CheckpointError(f"Shard {shard} cannot be read: {error.strerror}.") from None
    except SafetensorError as error:
        raise CheckpointError(f"Shard {shard} is truncated or damaged ({error}); fetch it again.") from None


def locate(folder: Path) -> tuple[dict[str, StoredTensor], list[str]]:
    """Every tensor of the folder by its name, and sentences to warn with. Only headers are read.

    Raises CheckpointError for an index that contradicts its files, and for names or sets of weights that are there
    twice.
    """
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    files = sorted(path for path in folder.glob("*.safetensors") if not path.is_dir() and path.name[0] != ".")
    if len(indexes) > 1:
        raise _two_sets(folder, indexes[0].name, indexes[1].name)
    if indexes:
        return _by_index(folder, indexes[0], files)
    if not files:
        others = sorted(path.name for pattern in _OTHER_FORMATS for path in folder.glob(pattern))
        found = f" (it has {others[0]}{', …' if len(others) > 1 else ''})" if others else ""
        raise CheckpointError(f"{folder} holds no *.safetensors file{found}; only safetensors checkpoints are read.")
    return _without_index(files), []


def _without_index(files: list[Path]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in _header(file):
            if name in tensors:
                raise CheckpointError(f"Tensor {name} is both in {tensors[name].file} and in {file.name}, and no index "
                                      "says which counts; move one of the files elsewhere.")
            tensors[name] = tensor
    return tensors


def _by_index(folder: Path, index: Path, files: list[Path]) -> tuple[dict[str, StoredTensor], list[str]]:
    weight_map = _weight_map(index)
    listed = {folder / name for name in weight_map.values()}
    for file in files:
        if file not in listed:
            raise _two_sets(folder, index.name, file.name)
    tensors: dict[str, StoredTensor] = {}
    copies: list[tuple[str, str]] = []
    for file in sorted(listed):
        if not os.path.isfile(file):  # noqa: PTH113 - no error for a name that no file can have
            raise CheckpointError(f"Shard {file} is missing, though {index.name} lists it; fetch the checkpoint again.")
        for name, tensor in _header(file):
            if name not in weight_map:
                raise CheckpointError(f"Shard {file} holds tensor {name}, which {index.name} does not list; fetch both "
                                      "again from one place.")
            if folder / weight_map[name] == file:
                tensors[name] = tensor
            else:
                copies.append((name, file.name))
    for name, shard in weight_map.items():
        if name not in tensors:
            raise CheckpointError(f"Tensor {name} is not in {folder / shard}, though {index.name} says so; fetch both "
                                  "again from one place.")
    if not copies:
        return tensors, []
    name, shard = copies[0]
    more = f" (and {count(len(copies) - 1, 'more such tensor')})" if len(copies) > 1 else ""
    return tensors, [f"{shard} holds a second copy of tensor {name}{more}, which was not read: {index.name} names "
                     f"{weight_map[name]}."]


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index, MOST_TABLE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map of tensor names to files; fetch it again.")
    for name, shard in weight_map.items():
        _check_name(index, name)
        path = PurePosixPath(shard)
        if path.is_absolute() or ".." in path.parts or "\\" in shard or ":" in shard:
            raise CheckpointError(f"{index} places tensor {name} in {shown(shard)}, which is outside the checkpoint's "
                                  "folder; fetch it from a source you trust.")
        if path.suffix != ".safetensors" or len(shard) > _MOST_NAME:
            raise CheckpointError(f"{index} places tensor {name} in {shown(shard)}, which is no safetensors file; only "
                                  "safetensors checkpoints are read.")
    return weight_map


def _header(file: Path) -> Iterator[tuple[str, StoredTensor]]:
    handle = open_shard(file)
    for name in handle.keys():  # noqa: SIM118 - not a dict
        _check_name(file, name)
        part = handle.get_slice(name)
        yield name, StoredTensor(file, part.get_dtype(), tuple(part.get_shape()))


def _check_name(file: Path, name: str) -> None:
    if len(name) > _MOST_NAME:
        raise CheckpointError(f"{file} has a tensor whose name has {len(name)} characters, which no family knows; "
                              "fetch the file again.")


def _two_sets(folder: Path, first: str, second: str) -> CheckpointError:
    return CheckpointError(f"{folder} holds two sets of weights, {first} and {second}; move the one that is not meant "
                           "elsewhere.")
