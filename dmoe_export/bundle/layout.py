"""Where experts lie in the expert file, and whether those numbers fit the model (docs/bundle.md, "Expert file")."""

from __future__ import annotations

from pydantic import Field, model_validator

from ..description import ITEMSIZES, Frozen, ModelDescription, Precision
from ..weight_formats import ExpertQuantisation, WeightFormats


class ExpertLayer(Frozen):
    """Byte offsets of one layer's tensors in the expert file."""

    layer: int
    gate_up_offset: int
    down_offset: int
    gate_up_scales_offset: int | None = Field(None, description="where experts are quantised")
    down_scales_offset: int | None = None


class ExpertsEntry(Frozen):
    """Layout of the expert file; expert e of a tensor starts at offset + e × slab bytes."""

    file: str
    stored_width: int = Field(description="I as stored: zero rows pad a slab to whole pages")
    gate_up_slab_bytes: int
    down_slab_bytes: int
    layers: list[ExpertLayer]
    quantisation: ExpertQuantisation | None = Field(None, description="null: weights are floats")
    gate_up_scales_slab_bytes: int = 0
    down_scales_slab_bytes: int = 0

    @model_validator(mode="after")
    def _scales_where_quantised(self) -> ExpertsEntry:
        places = [offset for layer in self.layers for offset in (layer.gate_up_scales_offset, layer.down_scales_offset)]
        sizes = [self.gate_up_scales_slab_bytes, self.down_scales_slab_bytes]
        if self.quantisation and (None in places or 0 in sizes):
            raise ValueError("quantised experts need scales")
        if not self.quantisation and (any(place is not None for place in places) or any(sizes)):
            raise ValueError("scales need quantisation")
        return self

    @property
    def bytes_per_expert(self) -> int:
        """Bytes that using one expert touches, scales included."""
        return (self.gate_up_slab_bytes + self.down_slab_bytes + self.gate_up_scales_slab_bytes
                + self.down_scales_slab_bytes)


def check_expert_layout(entry: ExpertsEntry, model: ModelDescription, formats: WeightFormats, compute: Precision,
                        file_size: int | None) -> None:
    """Raise ValueError unless slabs are as large as the format says and lie in the file, none over another.

    `file_size` None: of a file that is not listed.
    """
    values, how = model.hidden_size * entry.stored_width, entry.quantisation  # of down; gate_up has twice as many
    weight = values * how.bits // 8 if how else values * ITEMSIZES[formats.experts or compute]
    scale = values // how.group_size * ITEMSIZES[compute] if how else 0
    slabs = (entry.gate_up_slab_bytes, entry.down_slab_bytes, entry.gate_up_scales_slab_bytes,
             entry.down_scales_slab_bytes)
    if slabs != (2 * weight, weight, 2 * scale, scale) or values <= 0:
        raise ValueError(f"slabs of {slabs} bytes are not those of experts {model.hidden_size} x {entry.stored_width}")
    free = 0
    for start, slab in sorted((offset, slab) for layer in entry.layers for offset, slab in zip(
            (layer.gate_up_offset, layer.down_offset, layer.gate_up_scales_offset, layer.down_scales_offset), slabs,
            strict=True) if offset is not None):
        if start < free:
            raise ValueError(f"expert offset {start} lies in another tensor")
        free = start + slab * model.experts.num_experts
    if file_size is not None and free > file_size:
        raise ValueError(f"experts reach to byte {free} of {entry.file}, which has {file_size}")
