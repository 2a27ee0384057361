"""Stream weights from a checkpoint into a bundle's data files; one chunk or one expert is in memory at a time."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor

from ..bundle.manifest import ExpertLayer, ExpertsEntry
from ..bundle.writer import PAGE, BundleWriter, DataFile
from ..checkpoint.family import Checkpoint
from ..description import ModelDescription
from ..errors import CheckpointError
from ..model.load import interleave

DENSE_FILE, EXPERTS_FILE = "denoiser.onnx.data", "experts.bin"
_DTYPES = {torch.float32: ir.DataType.FLOAT, torch.float16: ir.DataType.FLOAT16, torch.bfloat16: ir.DataType.BFLOAT16}

Progress = Callable[[int], None]


def padded_width(hidden: int, width: int, itemsize: int) -> int:
    """Least I' ≥ I for which every expert slab of H·I'·itemsize bytes is whole pages."""
    step = PAGE // math.gcd(PAGE, hidden * itemsize)
    return -(-width // step) * step


def raw_bytes(tensor: Tensor) -> memoryview:
    """The tensor's memory, as bytes."""
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())


class WeightStream:
    """Moves all weights of a checkpoint into a bundle and points the model's initializers at them."""

    def __init__(self, checkpoint: Checkpoint, writer: BundleWriter, model: ir.Model, dtype: torch.dtype,
                 stored_width: int, progress: Progress) -> None:
        self._checkpoint, self._writer, self._model = checkpoint, writer, model
        self._dtype, self._width, self._progress = dtype, stored_width, progress
        self._identity = hashlib.sha256(repr(sorted(checkpoint.full_description.model_dump().items())).encode())

    @property
    def identity(self) -> str:
        """sha256 over the description and all bytes read, in the order of writing."""
        return self._identity.hexdigest()

    def write_dense(self) -> None:
        """Everything but the routed experts → denoiser.onnx.data; the router stays float32."""
        file = self._writer.data_file(DENSE_FILE)
        for ours, tensor in self._checkpoint.weights.dense.items():
            dtype = torch.float32 if ".router." in ours else self._dtype
            offset = file.align(PAGE if math.prod(self._checkpoint.reader.shape(tensor)) >= PAGE else 64)
            self._name(tensor)
            for chunk in self._checkpoint.reader.chunks(tensor):
                file.write(self._converted(chunk, dtype, tensor))
            self._attach(ours, DENSE_FILE, offset, file.offset - offset, dtype, self._checkpoint.reader.shape(tensor))
        self._writer.finish_data_file(file)

    def write_experts(self) -> ExpertsEntry:
        """Routed experts → experts.bin: per layer [E, 2I', H] interleaved, then [E, H, I']."""
        d, file = self._checkpoint.description, self._writer.data_file(EXPERTS_FILE)
        layers = [self._write_layer(file, layer, d) for layer in d.moe_layers]
        self._writer.finish_data_file(file)
        slab = d.hidden_size * self._width * self._dtype.itemsize
        return ExpertsEntry(file=EXPERTS_FILE, stored_width=self._width, gate_up_slab_bytes=2 * slab,
                            down_slab_bytes=slab, layers=layers)

    def _write_layer(self, file: DataFile, layer: int, d: ModelDescription) -> ExpertLayer:
        weights, pad = self._checkpoint.weights, self._width - d.moe.expert_width
        experts = range(d.moe.num_experts)
        gate_up = (interleave(*weights.gate_up(layer, e)) for e in experts)
        down = (weights.down(layer, e) for e in experts)
        offsets = []
        for name, shape, slabs, padding in (
                ("gate_up", (2 * self._width, d.hidden_size), gate_up, (0, 0, 0, 2 * pad)),
                ("down", (d.hidden_size, self._width), down, (0, pad))):
            offset = file.align()
            self._name(f"{layer}.{name}")
            for slab in slabs:
                file.write(self._converted(slab, self._dtype, f"of layer {layer}'s experts", padding))
            self._attach(f"layers.{layer}.ffn.{name}", EXPERTS_FILE, offset, file.offset - offset, self._dtype,
                         (d.moe.num_experts, *shape))
            offsets.append(offset)
        return ExpertLayer(layer=layer, gate_up_offset=offsets[0], down_offset=offsets[1])

    def _name(self, name: str) -> None:
        self._identity.update(name.encode())

    def _converted(self, tensor: Tensor, dtype: torch.dtype, name: str, padding: tuple[int, ...] = ()) -> memoryview:
        self._identity.update(raw_bytes(tensor))  # before type and padding: the identity is the checkpoint's alone
        out = F.pad(tensor.to(dtype), padding)
        if dtype == torch.float16 and not torch.isfinite(out).all():
            raise CheckpointError(f"Tensor {name} in {self._checkpoint.folder} has values beyond float16; "
                                  "use --precision bf16 or fp32.")
        self._progress(out.nbytes)
        return raw_bytes(out)

    def _attach(self, name: str, file: str, offset: int, length: int, dtype: torch.dtype,
                shape: tuple[int, ...]) -> None:
        value = self._model.graph.initializers[name]
        value.const_value = ir.ExternalTensor(file, offset, length, _DTYPES[dtype], shape=ir.Shape(shape), name=name,
                                              base_dir=self._writer.folder)
