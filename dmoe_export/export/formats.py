"""What the precisions asked for mean: how every part of a bundle's weights is stored."""

from __future__ import annotations

from typing import Any, get_args

from ..checkpoint.family import Checkpoint
from ..description import ExportPrecision, ModelDescription, Precision, QuantisedPrecision
from ..errors import InputError
from ..weight_formats import WeightFormats

_GROUP_SIZES = (32, 64, 128)
_STORED: dict[str, Precision] = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
_INTEGERS = get_args(QuantisedPrecision)


def stored_precision(types: frozenset[str]) -> tuple[Precision, str]:
    """The floats that hold a checkpoint's matrices exactly, and why, from the types it stores them in."""
    if len(types) == 1 and (one := _STORED.get(min(types))):
        return one, "as the checkpoint stores them"
    return "fp32", f"the checkpoint stores {' and '.join(sorted(types))}"


def choose_formats(source: Checkpoint, precision: ExportPrecision | None, compute: Precision, *,
                   dense: ExportPrecision | None = None, head: ExportPrecision | None = None,
                   embedding: ExportPrecision | None = None, group_size: int | None = None
                   ) -> tuple[WeightFormats, list[str]]:
    """Each part's format, and sentences to warn with; InputError for what makes no sense.

    `precision` None: as the checkpoint stores its matrices. The others default to it, and where linear layers become
    integers the head has 8 bits, as its errors are the logits'. A model with tied embeddings has one tensor for both.
    """
    d = source.description
    asked = {"Dense precision": dense, "Head precision": head, "Embedding precision": embedding}
    for name, value in asked.items():
        if value not in (None, *get_args(ExportPrecision)):
            raise InputError(f"{name} {value!r} is not known; known: {', '.join(get_args(ExportPrecision))}.")
    if compute not in get_args(Precision):
        raise InputError(f"Compute type {compute!r} is not known; known: {', '.join(get_args(Precision))}.")
    reason = "" if precision is None else "asked for"
    if precision is None:
        precision, reason = stored_precision(source.weights.matrix_types)
    dense = dense or precision
    if d.canvas and any(stored in _INTEGERS for stored in (head, embedding)):
        raise InputError(f"The embedding of {d.architecture} is multiplied with from both sides, which no kernels do "
                         f"with integers; leave --head-precision and --embedding-precision out, or give floats.")
    fewest = stored_precision(source.weights.matrix_types)[0] if d.canvas and compute == "fp32" else compute
    head = head or (embedding if d.tie_embeddings else None) or (
        dense if dense not in _INTEGERS else fewest if d.canvas else "int8")
    embedding = embedding or (head if d.tie_embeddings else dense)
    if d.tie_embeddings and embedding != head:
        raise InputError(f"The model ties its embedding to its vocabulary head, which are one tensor, so it cannot be "
                         f"{embedding} and {head}; give the same --embedding-precision and --head-precision.")
    parts: dict[str, Any] = {"dense": dense, "head": head, "embedding": embedding,
                             "experts": precision if d.moe else None}
    _check_compute(parts, compute)
    if not any(stored in _INTEGERS for stored in parts.values()):
        if group_size is not None:
            raise InputError(f"group_size belongs to precision int8 or int4, and the precision is {precision}; leave "
                             "it out.")
        return WeightFormats(**parts, group_size=None, reason=reason), []
    widths = _inner_widths(d, dense in _INTEGERS)
    formats = WeightFormats(**parts, group_size=_group_size(d, list(widths.values()), group_size), reason=reason)
    assert formats.group_size
    odd = {layer: width for layer, width in widths.items() if width % formats.group_size}
    return formats, [f"Groups of {formats.group_size} do not divide {width}, the inner width of {layer}, so it stays "
                     f"in {compute}." for layer, width in odd.items()]


def _check_compute(parts: dict[str, Any], compute: Precision) -> None:
    """Floats are stored as they are computed with, or narrower and widened to float32."""
    integers = [part for part, stored in parts.items() if stored in _INTEGERS and part != "experts"]
    if compute == "bf16" and integers:
        raise InputError(f"The {integers[0]} weights cannot be integers where bf16 is computed with, as no kernels do "
                         f"that; use --compute fp32, or --dense-precision bf16.")
    for one in sorted({stored for stored in parts.values() if stored}):
        if compute != "fp32" and one in get_args(Precision) and one != compute:
            raise InputError(f"Weights in {one} cannot be computed with in {compute}; use --compute fp32, or store "
                             f"them in {compute}.")


def _inner_widths(d: ModelDescription, dense: bool) -> dict[str, int]:
    """The axis that products sum over, of each kind of layer that may become integers."""
    widths = {"experts, embedding and most linear layers": d.hidden_size}
    if dense:
        widths["attention's output"] = d.num_heads * d.head_dim
        if d.moe_layers.start:
            widths["the dense feed-forward's down"] = d.dense_width
        if d.moe and d.moe.shared_width and d.moe_layers:
            widths["the shared experts' down"] = d.moe.shared_width
    return widths


def _group_size(d: ModelDescription, widths: list[int], asked: int | None) -> int:
    """The one asked for; else 64, or 32 where that lets more layers be integers."""
    fits = [size for size in _GROUP_SIZES if d.hidden_size % size == 0]
    usual = next((size for size in (64, 32) if size in fits), None)
    if usual == 64 and any(width % 64 and not width % 32 for width in widths):
        usual = 32
    size = asked or usual
    if size not in fits:
        known = f"use {' or '.join(map(str, fits))}" if fits else "no group size fits it; use --precision fp16"
        what = f"Group size {size} does" if size else "Groups of 32, 64 and 128 do"
        raise InputError(f"{what} not divide the hidden size {d.hidden_size}, or is not 32, 64 or 128; {known}.")
    return size
