"""Is a checkpoint the one that a bundle was made from? Sizes field by field, then digests part by part."""

from __future__ import annotations

from typing import Any

from .. import words
from ..bundle.reader import Bundle
from ..checkpoint.family import Checkpoint
from ..export.conversion import Conversion, Digests, identity
from ..weight_formats import WeightFormats
from .result import IdentityCheck

Difference = tuple[str, Any, Any]
"""A field, its value in the bundle, its value in the checkpoint."""


def check_identity(bundle: Bundle, checkpoint: Checkpoint, layers: int | None,
                   digests: Digests | None = None) -> IdentityCheck:
    """Compare trunk and first `layers` layers (None: all of the bundle's) with the manifest's checkpoint entry.

    `digests`: of exactly these parts, as `check_weights` leaves them; without it the checkpoint is read here.
    """
    entry = bundle.manifest.checkpoint
    count = compared_layers(bundle, checkpoint, layers)
    field = first_difference(bundle, checkpoint)
    if field:
        return _result(bundle, False, None, describe_difference(checkpoint, field))
    parts = (digests or read_digests(checkpoint, count)).parts
    whole = count == bundle.manifest.model.num_layers
    found = identity(checkpoint, parts) if whole else None
    names = ["the tensors outside the layers", *(f"layer {layer}" for layer in range(count))]
    wrong = [name for name, ours, theirs in zip(names, entry.parts, parts, strict=False) if ours != theirs]
    if wrong:
        return _result(bundle, False, found, f"{checkpoint.folder} is not the checkpoint of this bundle: it has the "
                       f"same sizes, but other weights in {_some(wrong)}; name the one that the bundle was exported "
                       "from, or export again.")
    what = "every tensor that the bundle was made from" if whole else f"all outside layers and layers 0 … {count - 1}"
    all_of_them = words.count(entry.layers_total, "layer")
    cut = f" (the bundle keeps {count} of {all_of_them})" if whole and count < entry.layers_total else ""
    return _result(bundle, True, found, f"The same checkpoint: {what}, byte for byte{cut}.")


def read_digests(checkpoint: Checkpoint, layers: int) -> Digests:
    """Digests of trunk and first layers, which reads them all."""
    width = checkpoint.description.moe.expert_width if checkpoint.description.moe else 0
    formats = WeightFormats.all_as("fp32", checkpoint.description.moe is not None)
    conversion = Conversion(checkpoint, formats, "fp32", width, layers)
    for tensors in (conversion.dense(), conversion.experts()):
        for tensor in tensors:
            for _ in tensor.chunks:
                pass
    return conversion.digests


def compared_layers(bundle: Bundle, checkpoint: Checkpoint, layers: int | None) -> int:
    """How many layers bundle, checkpoint and request have in common."""
    count = min(bundle.manifest.model.num_layers, checkpoint.description.num_layers)
    return count if layers is None else min(count, layers)


def first_difference(bundle: Bundle, checkpoint: Checkpoint) -> Difference | None:
    """The first field in which the checkpoint's description is not the bundle's; None when all agree.

    The bundle's number of layers may be less: it was exported with --layers.
    """
    entry, ours, theirs = bundle.manifest.checkpoint, bundle.manifest.model, checkpoint.full_description
    if entry.layers_total != theirs.num_layers:
        return "num_layers", entry.layers_total, theirs.num_layers
    others = {"num_layers", "edit_tokens"}  # an export may be told of tokens that the checkpoint does not name
    return _first(ours.model_dump(exclude=others), theirs.model_dump(exclude=others), "")


def describe_difference(checkpoint: Checkpoint, difference: Difference) -> str:
    """One sentence."""
    field, ours, theirs = difference
    return (f"{checkpoint.folder} is another model: its {field} is {theirs}, the bundle's checkpoint had {ours}; name "
            "the checkpoint that the bundle was exported from, or export again.")


def _first(ours: dict[str, Any], theirs: dict[str, Any], prefix: str) -> Difference | None:
    for name in ours:
        mine, other = ours[name], theirs[name]
        if mine == other:
            continue
        if isinstance(mine, dict) and isinstance(other, dict):
            return _first(mine, other, f"{prefix}{name}.")
        if isinstance(mine, dict) or isinstance(other, dict):  # experts against none
            mine, other = ("some" if isinstance(v, dict) else "none" for v in (mine, other))
        return f"{prefix}{name}", mine, other
    return None


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {words.count(len(names) - 3, 'more layer')}" if len(names) > 3 else "")


def _result(bundle: Bundle, same: bool, found: str | None, note: str) -> IdentityCheck:
    return IdentityCheck(same=same, bundle=bundle.manifest.checkpoint.identity, reference=found, note=note)
