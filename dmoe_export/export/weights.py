"""Stream weights from a checkpoint into a bundle's data files and point the graph's initializers at them."""

from __future__ import annotations

import math
from collections.abc import Callable

import onnx_ir as ir
import torch

from ..bundle.layout import ExpertLayer, ExpertsEntry
from ..bundle.writer import PAGE, BundleWriter, DataFile
from ..checkpoint.family import Checkpoint
from ..description import Precision
from ..weight_formats import WeightFormats
from .conversion import DENSE_FILE, EXPERTS_FILE, Conversion, StoredTensor

_DTYPES = {torch.float32: ir.DataType.FLOAT, torch.float16: ir.DataType.FLOAT16, torch.bfloat16: ir.DataType.BFLOAT16,
           torch.uint8: ir.DataType.UINT8}

Progress = Callable[[int], None]


class WeightStream:
    """Moves all weights of a checkpoint into a bundle and points the model's initializers at them."""

    def __init__(self, checkpoint: Checkpoint, writer: BundleWriter, model: ir.Model, formats: WeightFormats,
                 compute: Precision, stored_width: int, progress: Progress) -> None:
        self._checkpoint, self._writer, self._model = checkpoint, writer, model
        self._width, self._progress, self._formats = stored_width, progress, formats
        self._conversion = Conversion(checkpoint, formats, compute, stored_width)

    @property
    def parts(self) -> list[str]:
        """Digests of the checkpoint's parts (see `Digests`), once all is written."""
        return self._conversion.digests.parts

    def write_dense(self) -> None:
        """Everything but the routed experts → denoiser.onnx.data."""
        file = self._writer.data_file(DENSE_FILE)
        for tensor in self._conversion.dense():
            self._write(file, DENSE_FILE, tensor, PAGE if math.prod(tensor.shape) >= PAGE else 64)
        self._writer.finish_data_file(file)

    def write_experts(self) -> ExpertsEntry | None:
        """Routed experts → experts.bin, each tensor at a page; None without experts."""
        d = self._checkpoint.description
        if d.moe is None:
            return None
        file = self._writer.data_file(EXPERTS_FILE)
        offsets: dict[str, int] = {}
        slabs: dict[str, int] = {}
        for tensor in self._conversion.experts():
            offsets[tensor.name] = self._write(file, EXPERTS_FILE, tensor, PAGE)
            slabs[tensor.name.rpartition(".")[2]] = (file.offset - offsets[tensor.name]) // d.moe.num_experts
        self._writer.finish_data_file(file)
        layers = [ExpertLayer(layer=layer, **{f"{part}_offset": offsets[f"layers.{layer}.ffn.{part}"]
                                              for part in slabs}) for layer in d.moe_layers]
        return ExpertsEntry(file=EXPERTS_FILE, stored_width=self._width, layers=layers,
                            quantisation=self._formats.quantisation(self._formats.experts),
                            **{f"{part}_slab_bytes": size for part, size in slabs.items()})

    def _write(self, file: DataFile, name: str, tensor: StoredTensor, alignment: int) -> int:
        """The tensor's offset in the file, after writing it and pointing the initializer there."""
        offset = file.align(alignment)
        for chunk in tensor.chunks:
            file.write(chunk)
            self._progress(len(chunk))
        value = self._model.graph.initializers[tensor.name]
        value.const_value = ir.ExternalTensor(name, offset, file.offset - offset, _DTYPES[tensor.dtype],
                                              shape=ir.Shape(tensor.shape), name=tensor.name,
                                              base_dir=self._writer.folder)
        return offset
