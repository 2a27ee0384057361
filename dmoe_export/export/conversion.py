"""A checkpoint's weights as a bundle stores them, and digests of what was read; used by the export and by `check`."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bundle.writer import PAGE
from ..checkpoint.family import Checkpoint
from ..checkpoint.reader import all_finite
from ..description import ModelDescription, MoeDescription, Precision
from ..errors import CheckpointError
from ..model.load import interleave
from ..ops.experts.quantised import quantise
from ..weight_formats import ExpertQuantisation, WeightFormats

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SHARED_GATE_UP = "ffn.shared.gate_up.weight"
# Axes that came after the first bundles, at their defaults no part of an identity.
_LATER = ("canvas", "window", "global_attention", "attention_scale", "value_norm", "activation",
          "sandwich", "scaled_embedding", "logit_softcap")
_LATER_OF_EXPERTS = ("expert_scale", "own_norm", "beside_dense")
DENSE_FILE, EXPERTS_FILE = "denoiser.onnx.data", "experts.bin"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a bundle's data files; `chunks` can be read once, in order (one chunk per expert, for experts)."""

    name: str  # the graph's initializer
    layer: int | None  # None: embeddings, last norm, vocabulary head
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Iterator[memoryview]


def padded_width(hidden: int, width: int, itemsize: int, how: ExpertQuantisation | None = None) -> int:
    """Least I' ≥ I for which every expert slab of H·I'·itemsize bytes is whole pages.

    Quantised: of H·I'·bits/8 bytes, and groups fill I'. The scales beside it need not be whole pages.
    """
    bits = how.bits if how else 8 * itemsize
    step = math.lcm(8 * PAGE // math.gcd(8 * PAGE, hidden * bits), how.group_size if how else 1)
    return -(-width // step) * step


def two_names(gate_up: str) -> tuple[str, str]:
    """Names of the two matrices that older bundles have in the place of a shared expert's gate_up."""
    return gate_up.replace("gate_up", "gate"), gate_up.replace("gate_up", "up")


def raw_bytes(tensor: Tensor) -> memoryview:
    """The tensor's memory, as bytes."""
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())


class Digests:
    """sha256 per part of a checkpoint, of names and bytes as stored: the trunk (all outside layers), each layer."""

    def __init__(self, layers: int) -> None:
        self._trunk, self._layers = hashlib.sha256(), [hashlib.sha256() for _ in range(layers)]

    def update(self, layer: int | None, data: bytes | memoryview) -> None:
        """Add to a part."""
        (self._trunk if layer is None else self._layers[layer]).update(data)

    @property
    def parts(self) -> list[str]:
        """Hexadecimal, trunk first; final once dense tensors and experts were read to the end."""
        return [part.hexdigest() for part in (self._trunk, *self._layers)]


def identity(checkpoint: Checkpoint, parts: list[str]) -> str:
    """sha256 over the description of the whole checkpoint and the digests of the parts that were read."""
    described = checkpoint.full_description
    # One EOS, as in bundles from before `eos_ids`: what else ends an answer, or edits it, is no other model.
    fields = _as_before(described, _LATER) | {"eos_id": described.eos_id}
    if described.moe:
        fields["moe"] = _as_before(described.moe, _LATER_OF_EXPERTS)
    named = [(name, value) for name, value in fields.items() if name not in ("eos_ids", "edit_tokens")]
    description = repr(sorted(named))
    return hashlib.sha256("\n".join((description, *parts)).encode()).hexdigest()


def _as_before(part: ModelDescription | MoeDescription, later: tuple[str, ...]) -> dict[str, Any]:
    """Its fields without later ones that say nothing: bundles from before them keep their identity."""
    silent = {name for name in later if getattr(part, name) == type(part).model_fields[name].default}
    return part.model_dump(exclude=silent)


class Conversion:
    """Reads trunk and first layers of a checkpoint tensor by tensor: one chunk or one expert is in memory at a time."""

    def __init__(self, checkpoint: Checkpoint, formats: WeightFormats, compute: Precision, stored_width: int,
                 layers: int | None = None, two_shared: bool = False) -> None:
        """`compute`: type of norms, biases and scales. `layers` None: all that the checkpoint object keeps.

        `two_shared`: gate and up of shared experts are two matrices, as in older bundles.
        """
        self._two_shared = two_shared
        self._checkpoint, self._formats, self._compute, self._width = checkpoint, formats, compute, stored_width
        self._layers = checkpoint.description.num_layers if layers is None else layers
        self.digests = Digests(self._layers)

    def dense(self) -> Iterator[StoredTensor]:
        """Everything but the routed experts; the router stays float32. Quantised ones each before its scales."""
        reader = self._checkpoint.reader
        for ours, tensors in self._parameters():
            match = re.match(r"layers\.(\d+)\.", ours)
            layer = int(match[1]) if match else None
            if layer is not None and layer >= self._layers:
                continue
            shapes = [reader.shape(tensor) for tensor in tensors]
            shape = (sum(rows for rows, *_ in shapes), *shapes[0][1:])  # one below the other
            stored = self._formats.of(ours, shape[-1], self._compute)
            how = self._formats.quantisation(stored)
            dtype = torch.float32 if how else DTYPES[stored]
            chunks = self._dense_chunks(ours, tensors, layer, dtype)
            if how:
                yield from self._quantised(ours, layer, shape, chunks, how)
            else:
                yield StoredTensor(ours, layer, dtype, shape, map(raw_bytes, chunks))

    def _parameters(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Names of ours, and the checkpoint's tensors for each."""
        for ours, tensors in self._checkpoint.weights.dense.items():
            if self._two_shared and ours.endswith(SHARED_GATE_UP):
                yield from ((name, (tensor,)) for name, tensor in zip(two_names(ours), tensors, strict=True))
            else:
                yield ours, tensors

    def experts(self) -> Iterator[StoredTensor]:
        """Routed experts: per layer [E, 2I', H] interleaved, then [E, H, I']; quantised, each before its scales."""
        d, width, stored = self._checkpoint.description, self._width, self._formats.experts
        how = self._formats.quantisation(stored)
        for layer in d.moe_layers:
            if layer >= self._layers:
                return
            number, pad = d.experts.num_experts, width - d.experts.expert_width
            assert stored, "the formats of a dense model"
            dtype = torch.float32 if how else DTYPES[stored]
            for part, shape, padding in (("gate_up", (number, 2 * width, d.hidden_size), (0, 0, 0, 2 * pad)),
                                         ("down", (number, d.hidden_size, width), (0, pad))):
                name, slabs = f"layers.{layer}.ffn.{part}", self._slabs(layer, part, dtype, padding)
                if how:
                    yield from self._quantised(name, layer, shape, slabs, how)
                else:
                    yield StoredTensor(name, layer, dtype, shape, map(raw_bytes, slabs))

    def _dense_chunks(self, ours: str, tensors: tuple[str, ...], layer: int | None,
                      dtype: torch.dtype) -> Iterator[Tensor]:
        for tensor in tensors:
            self.digests.update(layer, tensor.encode())
            for chunk in self._checkpoint.reader.chunks(tensor):
                yield self._converted(chunk, layer, dtype, tensor, self._option(ours))

    def _quantised(self, name: str, layer: int | None, shape: tuple[int, ...], slabs: Iterator[Tensor],
                   how: ExpertQuantisation) -> Iterator[StoredTensor]:
        """Packed weights, then their scales, which wait in memory meanwhile: bits / 2G of the tensor in fp32."""
        scales: list[Tensor] = []
        scale_type = DTYPES[self._compute]

        def packed() -> Iterator[memoryview]:
            for slab in slabs:
                integers, slab_scales = quantise(slab, how, scale_type)
                if not all_finite(slab_scales):
                    raise CheckpointError(f"Tensor {name} from {self._checkpoint.folder} has values that no scale in "
                                          "float16 reaches; use --compute fp32, or with build --dense-precision bf16.")
                scales.append(slab_scales)
                yield raw_bytes(integers)

        *rows, inner = shape
        yield StoredTensor(name, layer, torch.uint8, (*rows, inner * how.bits // 8), packed())
        yield StoredTensor(f"{name}_scales", layer, scale_type, (*rows, inner // how.group_size),
                           (raw_bytes(slab) for slab in scales))

    def _slabs(self, layer: int, part: str, dtype: torch.dtype, padding: tuple[int, ...]) -> Iterator[Tensor]:
        weights = self._checkpoint.weights
        self.digests.update(layer, part.encode())
        for expert in range(self._checkpoint.description.experts.num_experts):
            slab = interleave(*weights.gate_up(layer, expert)) if part == "gate_up" else weights.down(layer, expert)
            yield self._converted(slab, layer, dtype, f"of layer {layer}'s experts", "--precision", padding)

    def _option(self, parameter: str) -> str:
        """What decides how a parameter is stored."""
        if len(set(self._formats.parts.values())) == 1:
            return "--precision"
        return {"embed.weight": "--embedding-precision", "lm_head.weight": "--head-precision"}.get(
            parameter, "--dense-precision")

    def _converted(self, tensor: Tensor, layer: int | None, dtype: torch.dtype, name: str, option: str,
                   padding: tuple[int, ...] = ()) -> Tensor:
        self.digests.update(layer, raw_bytes(tensor))  # before type and padding: digests are the checkpoint's alone
        out = F.pad(tensor.to(dtype), padding)
        if torch.finfo(dtype).max < torch.finfo(tensor.dtype).max and not all_finite(out):
            wider = {torch.float16: "bf16 or fp32", torch.bfloat16: "fp32"}.get(dtype)
            advice = f"use {option} {wider}" if wider else "no bundle holds such numbers"
            raise CheckpointError(f"Tensor {name} in {self._checkpoint.folder} has values beyond "
                                  f"{str(dtype).removeprefix('torch.')}; {advice}.")
        return out
