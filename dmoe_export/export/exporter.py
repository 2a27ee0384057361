"""The export, from a checkpoint argument to a sealed bundle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import get_args

from .. import __version__
from ..bundle.card import CARD_NAME
from ..bundle.manifest import DecodeValues, Manifest
from ..bundle.origin import CheckpointEntry
from ..bundle.reader import Bundle, open_bundle
from ..bundle.writer import BundleWriter
from ..checkpoint.edit_tokens import give_edit_tokens
from ..checkpoint.end_ids import give_end_ids
from ..checkpoint.family import Checkpoint
from ..checkpoint.hub import resolve_checkpoint
from ..description import ExportPrecision, ModelDescription, Precision, RoutingChoice
from ..errors import InputError
from ..weight_formats import WeightFormats
from .conversion import DTYPES, identity, padded_width
from .decoding import choose_decoding
from .formats import choose_formats
from .graph_file import save_graph
from .licence import copy_licence
from .model_card import model_card, source_name, without_path
from .routing import choose_routing
from .salient import check_salient, export_salient
from .text_files import copy_text
from .trace import trace_denoiser
from .weights import WeightStream

GRAPH_FILE = "denoiser.onnx"

Report = Callable[[str, int, int], None]
"""Told the phase, the bytes written and the bytes to write; 0 of 0 where it is no matter of bytes."""


def export_checkpoint(checkpoint: str | Path | Checkpoint, out: str | Path, *,
                      precision: ExportPrecision | None = None, compute: Precision = "fp32",
                      dense_precision: ExportPrecision | None = None, head_precision: ExportPrecision | None = None,
                      embedding_precision: ExportPrecision | None = None, group_size: int | None = None,
                      routing: RoutingChoice | None = "auto", block_length: int | None = None,
                      layers: int | None = None, top_p: float | None = None, min_experts: int | None = None,
                      coreset_size: int | None = None, decode_defaults: DecodeValues | None = None,
                      presets: Mapping[str, DecodeValues] | None = None, salient: bool = False,
                      salient_capacity: Sequence[int] = (), edit_tokens: Sequence[int] | None = None,
                      end_ids: Sequence[int] | None = None, multi_block_editing: bool = False,
                      overwrite: bool = False, report: Report | None = None) -> Bundle:
    """Export a checkpoint folder or hub id to the bundle folder `out`, and open it.

    `precision` is how weights are stored; None: bf16, fp16 or fp32, as the checkpoint stores its matrices, else fp32.
    `compute` is the type of activations and caches: fp32 for CPUs, whatever is stored; GPUs want the weights' own.
    int8 and int4 have a scale per `group_size` weights (64, or 32 where a layer takes no 64). `dense_precision` (linear
    layers), `head_precision` (int8 where these are integers) and `embedding_precision` store these parts in another way
    (docs/quantisation.md).
    `layers` keeps the first N layers. `routing` auto (or None) is what the checkpoint was trained with, by its
    config.json (export/routing.py); another mode is exported with a warning, which the manifest keeps, and a dense
    model takes none. `block_length` None: `block_size` of config.json, what the checkpoint's name ends in (…-b32) where
    its family is named so, or the family's. `top_p`, `min_experts` (of mode top_p) and `coreset_size` (of top_c) set
    the bundle's defaults: the checkpoint's core_threshold or 0.6; k + groups − groups kept; its expert_capacity, or
    48/256 of the experts and no less than k. `decode_defaults` are settings of requests that say none (options of
    `Generator.generate`); the checkpoint's generation_config.json wins over them. `presets` are such settings under
    names that a request can ask for. `salient` adds the graph of salient-token decoding, `salient_capacity` a graph of
    static shapes for each M it names (docs/salient.md). `edit_tokens`: DELETE and SPLIT of a model that inserts and
    deletes, where its config.json does not say them. `end_ids` end an answer, besides those of the checkpoint's files.
    `multi_block_editing`: the graph has an input by which blocks see one another, which `edit_blocks` of a request
    needs.
    Raises CheckpointError for what cannot be read, OutputError for what cannot be written; `out` is complete or absent.
    """
    if precision not in (None, *get_args(ExportPrecision)) or routing not in (None, *get_args(RoutingChoice)):
        raise InputError(f"Precision {precision!r} or routing {routing!r} is not known; known: "
                         f"{', '.join(get_args(ExportPrecision))} and {', '.join(get_args(RoutingChoice))}.")
    source = (checkpoint if isinstance(checkpoint, Checkpoint)
              else Checkpoint(resolve_checkpoint(checkpoint), layers))
    if edit_tokens is not None:
        give_edit_tokens(source, edit_tokens)
    if end_ids is not None:
        give_end_ids(source, end_ids)
    d = source.description
    formats, odd = choose_formats(source, precision, compute, dense=dense_precision, head=head_precision,
                                  embedding=embedding_precision, group_size=group_size)
    route, warnings = choose_routing(source, routing, block_length,
                                     {"top_p": top_p, "min_experts": min_experts, "coreset_size": coreset_size})
    check_salient(d, route, salient, tuple(salient_capacity))
    if multi_block_editing and d.attention != "block_causal":
        raise InputError(f"Multi-block editing is for models whose blocks see no later ones, and family {d.family} has "
                         f"{d.attention} attention; leave --multi-block-editing out.")
    defaults, chosen, replaced = choose_decoding(source, route, decode_defaults or {}, presets or {},
                                                 multi_block_editing)
    width = expert_width(d, formats)
    total = _weight_bytes(d, width, formats, compute)
    written = 0

    def advance(count: int) -> None:
        nonlocal written
        written += count
        tell("weights", written, total)

    tell = report or (lambda phase, done, of: None)
    with BundleWriter(out, overwrite, bytes_needed=total) as writer:
        tokenizer, said = copy_text(source, writer)  # first: what is wrong with it is known within a second
        tell("trace", 0, 0)
        model = trace_denoiser(d, route, compute, formats, width, multi_block_editing)
        stream = WeightStream(source, writer, model, formats, compute, width, advance)
        stream.write_dense()
        expert_entry = stream.write_experts()
        tell("check", 0, 0)
        graph = save_graph(model, writer, GRAPH_FILE)
        if salient:
            tell("trace salient steps", 0, 0)
        salient_entry = (export_salient(model, d, route, compute, formats, width, tuple(salient_capacity), writer)
                         if salient else None)
        licence = copy_licence(source.folder, writer)
        name = source_name(source.folder if isinstance(checkpoint, Checkpoint) else checkpoint)
        manifest = Manifest(
            created_by=f"dmoe-export {__version__}", model=d, routing=route, precision=compute, weights=formats,
            checkpoint=CheckpointEntry(identity=identity(source, stream.parts), parts=stream.parts,
                                       layers_total=source.full_description.num_layers, source=name),
            denoiser=graph, salient=salient_entry, experts=expert_entry, tokenizer=tokenizer,
            files=writer.entries, engines=[], decode_defaults=defaults, presets=chosen,
            warnings=[without_path(w, source.folder, name)
                      for w in (*source.warnings, *odd, *warnings, *replaced, *said, *licence.warnings)])
        (writer.folder / CARD_NAME).write_text(model_card(manifest, licence), encoding="utf-8")
        writer.seal(manifest)
    source.reader.close()
    return open_bundle(out, verify="sizes")


def expert_width(d: ModelDescription, formats: WeightFormats) -> int:
    """I as stored; 0 for a dense model."""
    how = formats.quantisation(formats.experts)
    itemsize = 1 if how or formats.experts is None else DTYPES[formats.experts].itemsize
    return padded_width(d.hidden_size, d.moe.expert_width, itemsize, how) if d.moe else 0


def _weight_bytes(d: ModelDescription, width: int, formats: WeightFormats, compute: Precision) -> int:
    """About what the data files will take."""

    def per_weight(stored: ExportPrecision) -> float:
        how = formats.quantisation(stored)
        return how.bits / 8 + DTYPES[compute].itemsize / how.group_size if how else DTYPES[stored].itemsize

    dense_layers = d.num_layers if d.moe and d.moe.beside_dense else d.moe_layers.start
    widths = dense_layers * d.dense_width + (d.canvas.conditioning_width if d.canvas else 0)
    widths += len(d.moe_layers) * d.moe.shared_width if d.moe else 0
    attention = sum(2 * d.hidden_size * width * (d.num_heads + heads) for heads, width in d.cached_heads)
    linear = attention + 3 * d.hidden_size * widths
    table = d.vocab_size * d.hidden_size
    values = {"dense": linear, "head": 0 if d.tie_embeddings else table, "embedding": table,
              "experts": 3 * d.hidden_size * width * d.moe.num_experts * len(d.moe_layers) if d.moe else 0}
    return int(sum(values[part] * per_weight(stored) for part, stored in formats.parts.items()))
