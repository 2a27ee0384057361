"""Where the reference takes its weights from, one tensor or expert at a time: a checkpoint, or the bundle itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import onnx
import torch
from torch import Tensor

from ..bundle.graph_file import load_graph
from ..bundle.reader import Bundle
from ..checkpoint.family import Checkpoint
from ..description import ModelDescription
from ..errors import BundleError
from ..export.conversion import SHARED_GATE_UP, two_names
from ..model.load import interleave
from ..ops.experts.quantised import dequantise

_CHUNK_BYTES = 64 << 20


class WeightSource(Protocol):
    """Weights by the names of the eager model's parameters, as float32."""

    description: ModelDescription

    def dense(self, name: str, rows: slice | None = None) -> Tensor:
        """A parameter that is not a routed expert, or some of its rows."""
        ...

    def gate_up(self, layer: int, expert: int) -> Tensor:
        """Gate and up of one expert, rows interleaved, [2I', H]."""
        ...

    def down(self, layer: int, expert: int) -> Tensor:
        """Down of one expert, [H, I']."""
        ...


def row_chunks(source: WeightSource, name: str, rows: int, width: int) -> Iterator[Tensor]:
    """A matrix [rows, width] in pieces of at most 64 MiB."""
    step = max(1, _CHUNK_BYTES // (4 * width))
    for start in range(0, rows, step):
        yield source.dense(name, slice(start, min(start + step, rows)))


class CheckpointWeights:
    """Of a checkpoint; shards are mapped, and only what is asked for is read."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.description = checkpoint.description
        self._reader, self._weights = checkpoint.reader, checkpoint.weights

    def dense(self, name: str, rows: slice | None = None) -> Tensor:
        """As in WeightSource; rows of a parameter that is one tensor."""
        tensors = self._weights.dense[name]
        assert rows is None or len(tensors) == 1
        return torch.cat([self._reader.read(tensor, rows) for tensor in tensors]).float()

    def gate_up(self, layer: int, expert: int) -> Tensor:
        """As in WeightSource."""
        return interleave(*self._weights.gate_up(layer, expert)).float()

    def down(self, layer: int, expert: int) -> Tensor:
        """As in WeightSource."""
        return self._weights.down(layer, expert).float()


class BundleWeights:
    """Of a bundle: the graph's initializers, memory-mapped. Proves graph and backend, not the conversion."""

    def __init__(self, bundle: Bundle, description: ModelDescription) -> None:
        """Raises BundleError for weights that do not lie beside the graph as external data."""
        self.description = description
        self._folder, self._group_size = bundle.folder, bundle.manifest.formats.group_size
        graph = load_graph(bundle).graph
        self._tensors = {tensor.name: tensor for tensor in graph.initializer}

    def dense(self, name: str, rows: slice | None = None) -> Tensor:
        """As in WeightSource."""
        if name.endswith(SHARED_GATE_UP) and name not in self._tensors:
            return torch.cat([self.dense(part) for part in two_names(name)])
        stored = self._read(name, rows)
        if stored.dtype != torch.uint8:
            return stored.float()
        scales = self._read(f"{name}_scales", rows)
        values = scales.shape[-1] * (self._group_size or 0)  # of a row
        bits = 8 * stored.shape[-1] // max(values, 1)
        if bits not in (8, 4) or stored.shape != (*scales.shape[:-1], values * bits // 8):
            raise BundleError(f"{self._folder} has a weight {name} of {list(stored.shape)} bytes with scales of "
                              f"{list(scales.shape)}, which are not those of its manifest; export the bundle again.")
        return dequantise(stored, scales, bits)

    def gate_up(self, layer: int, expert: int) -> Tensor:
        """As in WeightSource."""
        return self.dense(f"layers.{layer}.ffn.gate_up", slice(expert, expert + 1))[0]

    def down(self, layer: int, expert: int) -> Tensor:
        """As in WeightSource."""
        return self.dense(f"layers.{layer}.ffn.down", slice(expert, expert + 1))[0]

    def _read(self, name: str, rows: slice | None) -> Tensor:
        tensor = self._tensors.get(name)
        if tensor is None or not tensor.external_data:
            raise BundleError(f"{self._folder} has no weight {name} beside its graph; export the bundle again.")
        where = {entry.key: entry.value for entry in tensor.external_data}
        dtype = {onnx.TensorProto.FLOAT: torch.float32, onnx.TensorProto.FLOAT16: torch.float16,
                 onnx.TensorProto.BFLOAT16: torch.bfloat16, onnx.TensorProto.UINT8: torch.uint8}[tensor.data_type]
        shape = tuple(tensor.dims)
        start, stop, _ = (rows or slice(None)).indices(shape[0])
        row_bytes = torch.Size(shape[1:]).numel() * dtype.itemsize
        with (self._folder / where["location"]).open("rb") as file:
            file.seek(int(where.get("offset", 0)) + start * row_bytes)
            raw = np.fromfile(file, np.uint8, (stop - start) * row_bytes)
        return torch.from_numpy(raw).view(dtype).reshape(stop - start, *shape[1:])
