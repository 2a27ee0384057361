"""A checkpoint of a published geometry that lies nowhere: tensors are made when they are read, for benchmarks of size.

Values are pieces of one seeded pool of normal numbers, so a model of 10 GB is made at the speed of copying. Pieces
begin an odd prime apart: no two tensors, experts or rows of the vocabulary are the same.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from ..description import ModelDescription
from ..errors import RequestError
from .family import Checkpoint, family_of, first_layers
from .layout import Layout, StoredWeights, dense_tensors, expert_tensors
from .reader import TensorReader
from .synthetic import GEOMETRIES, SCALES

_POOL = 1 << 24  # numbers: 64 MiB
_STRIDE = 999_983
_SHARD = 2 << 30  # bytes
ALIASES = {"llada-moe": "llada-moe-7b", "diffusion-gemma": "diffusion-gemma-26b-a4b"}


class GeneratedReader(TensorReader):
    """Reads what no file holds."""

    def __init__(self, folder: Path, description: ModelDescription, layout: Layout, seed: int, merged: bool) -> None:
        super().__init__(folder)
        self._shapes = {name: shape for tensors in dense_tensors(description, layout).values()
                        for name, shape in tensors.items()}
        self._shapes |= dict(expert_tensors(description, layout, merged))
        self._seed = seed

    @cached_property
    def _pool(self) -> Tensor:
        return torch.from_numpy(np.random.default_rng(self._seed).standard_normal(_POOL, np.float32))

    def stored_type(self, name: str) -> str:
        """As in TensorReader."""
        return "F32"

    def close(self) -> None:
        """Nothing is open."""

    def read(self, name: str, index: int | slice | None = None) -> Tensor:
        """The same numbers whenever the same part is asked for; parts are rows of the first axis."""
        shape = self.shape(name)
        rows = range(shape[0])[index] if isinstance(index, slice) else range(shape[0])
        if isinstance(index, int):
            return self.read(name, slice(index, index + 1))[0]
        part = (len(rows), *shape[1:])
        if "norm" in name or name.endswith(("ln_f.weight", *SCALES)):
            return torch.ones(part)
        count = torch.Size(part).numel()
        start = (zlib.crc32(name.encode()) + rows.start) * _STRIDE % (_POOL // 2)
        pool = self._pool
        while start + count > len(pool):
            pool = torch.cat([pool, pool.flip(0)])
        return pool[start:start + count].reshape(part) * (0.05 if name.endswith("bias") else shape[-1] ** -0.5)

    def chunks(self, name: str) -> Iterator[Tensor]:
        """A tensor in order, in pieces of at most half the pool."""
        shape = self.shape(name)
        step = max(1, _POOL // 2 // max(1, torch.Size(shape[1:]).numel()))
        for first in range(0, shape[0], step):
            yield self.read(name, slice(first, min(first + step, shape[0])))


class GeneratedCheckpoint(Checkpoint):
    """A checkpoint of a named geometry with seeded random float32 weights."""

    def __init__(self, geometry: str, layers: int | None = None, seed: int = 0, merged: bool = True) -> None:
        """`layers`: the first N [all]; `merged`: a tensor for all experts of a layer, not one for each.

        Raises RequestError for an unknown name, CheckpointError for bad `layers`.
        """
        config = GEOMETRIES.get(ALIASES.get(geometry, geometry))
        if config is None:
            raise RequestError(f"Geometry {geometry!r} is not known; known: {', '.join((*GEOMETRIES, *ALIASES))}.")
        self.folder, self.config = Path(geometry), config
        self.warnings, self.decode_defaults = [], {}
        family = self.family = family_of(config, self.folder)
        self.full_description = family.describe(config, self.folder)
        self.description = self.full_description if layers is None else first_layers(self.full_description, layers)
        layout = family.layout(self.description)
        self.reader = GeneratedReader(self.folder, self.description, layout, seed, merged)
        self.weights = StoredWeights(self.description, self.reader, layout)

    def write(self, folder: Path, dtype: str = "float32") -> None:
        """The checkpoint as a folder after all: config.json and safetensors shards of 2 GiB."""
        folder.mkdir(parents=True, exist_ok=True)
        config = _cut(self.config, self.description.num_layers)
        (folder / "config.json").write_text(json.dumps(config, indent=1))
        shard: dict[str, Tensor] = {}
        number = 0
        names = self.reader.names
        for name in names:
            shard[name] = self.reader.read(name).to(getattr(torch, dtype))
            if sum(tensor.nbytes for tensor in shard.values()) >= _SHARD or name == names[-1]:
                save_file(shard, folder / f"model-{number:05d}.safetensors", metadata={"format": "pt"})
                number, shard = number + 1, {}


def _cut(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """A config.json that says so many layers, where the family says it."""
    if "text_config" in config:
        return config | {"text_config": _cut(config["text_config"], layers)}
    field = "n_layers" if "n_layers" in config else "num_hidden_layers"
    kinds = {"layer_types": config["layer_types"][:layers]} if "layer_types" in config else {}
    return config | {field: layers} | kinds
