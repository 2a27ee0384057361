"""Whether a manifest's numbers about the expert file fit the model and each other (docs/bundle.md, "Expert file")."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..description import ModelDescription

if TYPE_CHECKING:
    from .manifest import ExpertsEntry


def check_expert_layout(entry: ExpertsEntry, model: ModelDescription, itemsize: int, file_size: int | None) -> None:
    """Raise ValueError unless slabs are as large as the format says and lie in the file, none over another.

    `itemsize`: bytes of a value that is not quantised; `file_size` None: of a file that is not listed.
    """
    values, how = model.hidden_size * entry.stored_width, entry.quantisation  # of down; gate_up has twice as many
    weight = values * how.bits // 8 if how else values * itemsize
    scale = values // how.group_size * itemsize if how else 0
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
