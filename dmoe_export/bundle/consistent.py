"""Whether a manifest agrees with itself: before any work or memory that goes by its numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..description import ITEMSIZES, ModelDescription, Precision, RoutingDescription
from ..weight_formats import ExpertQuantisation, WeightFormats
from .contract import ATTENTION_POSITIONS, GraphKind, Tensor, how_many, inputs_of, outputs_of

if TYPE_CHECKING:
    from .engine_entries import EngineEntry
    from .graph_entries import GraphEntry, TensorEntry
    from .manifest import Manifest

_LARGEST = 2**31 - 1  # of a size: what an int32 counts, as kernels do


def check_numbers(model: ModelDescription, routing: RoutingDescription) -> None:
    """Raise ValueError for sizes that no model of this kind has."""
    moe, other = model.moe, model.global_attention
    for name, value in _whole_numbers(model.model_dump() | routing.model_dump()):
        if value > _LARGEST:
            raise ValueError(f"{name} {_short(value)} is more than {_LARGEST}")
    pairs = [("the mask id", model.barred_id, "of the vocabulary", model.vocab_size - 1),
             ("the pad id", model.pad_id, "of the vocabulary", model.vocab_size - 1),
             ("rotary_dim", model.rotary_dim, "of a head", model.head_dim),
             ("num_kv_heads", model.num_kv_heads, "of the heads", model.num_heads),
             ("block_length", routing.block_length, "of the positions", model.max_positions)]
    if moe:
        pairs += [("experts_per_token", moe.experts_per_token, "of the experts", moe.num_experts),
                  ("num_groups", moe.num_groups, "of the experts", moe.num_experts),
                  ("groups_kept", moe.groups_kept, "of the groups", moe.num_groups),
                  ("first_dense_layers", moe.first_dense_layers, "of the layers", model.num_layers),
                  ("min_experts", routing.min_experts, "of the experts", moe.num_experts),
                  ("coreset_size", routing.coreset_size, "of the experts", moe.num_experts)]
    if other:
        if list(other.layers) != sorted({*other.layers}) or not other.layers or other.layers[-1] >= model.num_layers:
            raise ValueError(f"global_attention is not of some of the {model.num_layers} layers, in order")
        pairs += [("rotary_dim of global_attention", other.attention.rotary_dim, "of a head",
                   other.attention.head_dim),
                  ("num_kv_heads of global_attention", other.attention.num_kv_heads, "of the heads", model.num_heads)]
    if model.canvas:
        pairs.append(("the canvas", model.canvas.length, "of the positions", model.max_positions))
    for name, value, whole, most in pairs:
        if value > most:
            raise ValueError(f"{name} {value} is more than {most}, the largest {whole}")
    if model.wrong_edit_tokens:
        raise ValueError(model.wrong_edit_tokens)
    uneven = any(model.num_heads % heads for heads, _ in set(model.cached_heads))
    if uneven or (moe and moe.num_experts % moe.num_groups):
        raise ValueError("heads and groups do not divide evenly")


def _whole_numbers(fields: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """All of them, also in parts of parts; lists hold no parts."""
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from _whole_numbers(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            yield name, value


def check_formats(formats: WeightFormats, compute: Precision, experts: bool, how: ExpertQuantisation | None,
                  tied: bool) -> None:
    """Raise ValueError where the formats of weights are not those of the experts, or nothing computes with them."""
    if (formats.experts is not None) != experts or formats.quantisation(formats.experts) != how:
        raise ValueError(f"weights say experts {formats.experts} in groups of {formats.group_size}, and experts are "
                         f"{f'{how.name} in groups of {how.group_size}' if how else 'not quantised'}")
    if tied and formats.embedding != formats.head:
        raise ValueError(f"embedding and head are one tensor, and weights say {formats.embedding} and {formats.head}")
    for part, stored in formats.parts.items():
        if compute != "fp32" and stored in ITEMSIZES and stored != compute:
            raise ValueError(f"{part} weights are {stored}, which {compute} cannot be computed with")


def check_dense_size(model: ModelDescription, formats: WeightFormats, compute: Precision, file: str,
                     size: int | None) -> None:
    """Raise ValueError where a file of dense weights is too small for the model; `size` None: it is not listed."""
    needed = sum(part_bytes(model, formats, compute).values()) + ITEMSIZES[compute] * _vectors(model)
    if size is not None and needed > size:
        raise ValueError(f"a model of these sizes has {_short(needed)} bytes of dense weights or more, {file} has "
                         f"{size}")


def part_bytes(model: ModelDescription, formats: WeightFormats, compute: Precision) -> dict[str, int]:
    """Bytes of the embedding's, the head's and the linear layers' matrices, with scales; routers are not among them."""
    d, moe, hidden, mixed = model, model.moe, model.hidden_size, len(model.moe_layers)
    widths = [("", d.num_layers - mixed, d.dense_width), ("", mixed, moe.shared_width if moe else 0)]
    if moe and moe.beside_dense:
        widths.append(("dense.", mixed, d.dense_width))
    if d.canvas:
        widths.append(("", 1, d.canvas.conditioning_width))
    linear = [*((2 * count, f".ffn.{part}up.weight", width, hidden) for part, count, width in widths),
              *((count, f".ffn.{part}down.weight", hidden, width) for part, count, width in widths)]
    for (kv_heads, width), count in Counter(d.cached_heads).items():
        linear += [(count, ".attention.qkv.weight", (d.num_heads + 2 * kv_heads) * width, hidden),
                   (count, ".attention.out.weight", hidden, d.num_heads * width)]
    return {
        "embedding": _matrix_bytes(formats, compute, "embed.weight", d.vocab_size, hidden),
        "head": 0 if d.tie_embeddings else _matrix_bytes(formats, compute, "lm_head.weight", d.vocab_size, hidden),
        "linear_layers": sum(count * _matrix_bytes(formats, compute, name, rows, inner)
                             for count, name, rows, inner in linear)}


def _vectors(d: ModelDescription) -> int:
    """Numbers of norms, and of scales of layers and experts."""
    moe, of_layer = d.moe, 4 if d.sandwich else 2
    scales = (2 if d.canvas else 1) if d.sandwich else 0
    found = d.num_layers * (of_layer * d.hidden_size + scales) + d.hidden_size * (2 if d.canvas else 1)
    if d.qk_norm:
        found += 2 * sum(width for _, width in d.cached_heads)
    if moe:
        norms = (3 if moe.beside_dense else 0) + moe.own_norm
        found += len(d.moe_layers) * (norms * d.hidden_size + moe.expert_scale * moe.num_experts)
    return found


def _matrix_bytes(formats: WeightFormats, compute: Precision, name: str, rows: int, inner: int) -> int:
    """Of one parameter [rows, inner], with its scales."""
    stored = formats.of(name, inner, compute)
    how = formats.quantisation(stored)
    if how is None:
        return rows * inner * ITEMSIZES[stored]
    return rows * (inner * how.bits // 8 + inner // how.group_size * ITEMSIZES[compute])


def check_graphs(manifest: Manifest) -> None:
    """Raise ValueError unless every graph takes and gives what one of this model does."""
    graphs: list[tuple[GraphKind, GraphEntry]] = [("denoiser", manifest.denoiser)]
    if manifest.salient and manifest.model.canvas:
        raise ValueError("a model with a canvas of random tokens has no salient graphs")
    if salient := manifest.salient:
        graphs += [("salient", salient.graph), *(("salient", entry.graph) for entry in salient.fixed)]
        graphs += [("fill", salient.fill)] if salient.fill else []
    model, mode, precision = manifest.model, manifest.routing.mode, manifest.precision
    for kind, graph in graphs:
        kept, opens = (kind == "denoiser" and said for said in (graph.keeps_logits, graph.opens_blocks))
        if opens and model.attention != "block_causal":
            raise ValueError(f"{graph.file} takes {ATTENTION_POSITIONS}, for which a model with {model.attention} "
                             "attention has no use")
        if len(graph.inputs) != (wanted := how_many(model, mode, kind, kept, opens)):
            raise ValueError(f"{graph.file} has {len(graph.inputs)} inputs, that of a model of {model.num_layers} "
                             f"layers has {wanted}")
        _compare(graph.file, "input", graph.inputs, inputs_of(model, mode, precision, kind, kept, opens))
        _compare(graph.file, "output", graph.outputs, outputs_of(model, precision, kind, kept))


def check_engine(engine: EngineEntry, graphs: Sequence[str]) -> None:
    """Raise ValueError where an engine's entry names what it does not have, or profiles are none.

    `graphs`: files of those that an engine may be of beside the denoiser.
    """
    if engine.graph is not None and engine.graph not in graphs:
        raise ValueError(f"engine {engine.file} is of {engine.graph[:100]!r}, which is no salient graph of static "
                         "shapes")
    names = ["prefill", "denoise"] if engine.graph is None else ["salient"]
    if [profile.name for profile in engine.profiles] != names:
        raise ValueError(f"engine {engine.file} has not the profile{'s' if len(names) > 1 else ''} "
                         f"{' and '.join(names)}")
    for profile in engine.profiles:
        for least, usual, most in (profile.batch, profile.tokens, profile.past, profile.rows):
            if not 1 <= least <= usual <= most <= _LARGEST:
                raise ValueError(f"engine {engine.file} has a profile of {least} … {usual} … {most}")
    weights = {weight.name: weight for weight in engine.weight_inputs}
    for weight in weights.values():
        if not weight.shape or min(weight.shape) < 1 or math.prod(weight.shape) > weight.bytes:
            raise ValueError(f"engine {engine.file} has a weight {weight.name!r} of shape {weight.shape[:8]} in "
                             f"{weight.bytes} bytes")
    for pool in engine.expert_pools:
        for of, _ in pool.pairs:
            if of not in weights:
                raise ValueError(f"engine {engine.file} has a pool of {of!r}, which is no weight of it")


def check_once(names: Iterable[str], what: str) -> None:
    """Raise ValueError for a name that is there twice."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{what} {name[:100]!r} is there twice")
        seen.add(name)


def _compare(file: str, what: str, entries: Sequence[TensorEntry], wanted: list[Tensor]) -> None:
    found: list[Tensor] = [(entry.name, entry.dtype, entry.shape) for entry in entries]
    for one, other in zip(found, wanted, strict=False):  # lengths come last
        if one != other:
            raise ValueError(f"{file} has the {what} {_shown(one)} where that of this model is {_shown(other)}")
    if len(found) != len(wanted):
        raise ValueError(f"{file} has {len(found)} {what}s, that of this model has {len(wanted)}")


def _shown(tensor: Tensor) -> str:
    name, dtype, shape = tensor
    return f"{name[:100]!r} {dtype[:20]} [{', '.join(_short(size) for size in shape[:8])}]"


def _short(value: int | str) -> str:
    """A number, or a name, of a reasonable length."""
    if isinstance(value, int) and value.bit_length() > 200:
        return "of more than 60 digits"
    return str(value)[:60]
