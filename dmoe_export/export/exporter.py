"""The export, from a checkpoint argument to a sealed bundle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import torch

from .. import __version__
from ..bundle.card import CARD_NAME
from ..bundle.manifest import CheckpointEntry, Manifest
from ..bundle.reader import Bundle, open_bundle
from ..bundle.writer import BundleWriter
from ..checkpoint.family import Checkpoint
from ..checkpoint.hub import resolve_checkpoint
from ..description import (
    ExpertQuantisation,
    ExportPrecision,
    ModelDescription,
    Precision,
    RoutingChoice,
)
from ..errors import InputError
from .conversion import identity, padded_width
from .graph_file import save_graph
from .licence import copy_licence
from .model_card import model_card, source_name, without_path
from .quantisation import choose_precision
from .routing import choose_routing
from .salient import check_capacities, export_salient
from .text_files import copy_text
from .trace import trace_denoiser
from .weights import WeightStream

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
GRAPH_FILE = "denoiser.onnx"

Report = Callable[[str, int, int], None]
"""Told the phase, the bytes written and the bytes to write; 0 of 0 where it is no matter of bytes."""


def export_checkpoint(checkpoint: str | Path | Checkpoint, out: str | Path, *, precision: ExportPrecision = "fp32",
                      dense_precision: Precision | None = None, group_size: int | None = None,
                      routing: RoutingChoice | None = "auto", block_length: int | None = None,
                      layers: int | None = None, top_p: float | None = None, min_experts: int | None = None,
                      coreset_size: int | None = None, salient: bool = False, salient_capacity: Sequence[int] = (),
                      overwrite: bool = False, report: Report | None = None) -> Bundle:
    """Export a checkpoint folder or hub id to the bundle folder `out`, and open it.

    `precision` int8 or int4 quantises the routed experts, with a scale per `group_size` weights (64, or 32 where the
    hidden size takes no 64), and keeps the rest in `dense_precision` (fp32; docs/quantisation.md).
    `layers` keeps the first N layers. `routing` auto (or None) is what the checkpoint was trained with, by its
    config.json (export/routing.py); another mode is exported with a warning, which the manifest keeps, and a dense
    model takes none. `block_length` None: the checkpoint's `block_size`, else 32. `top_p`, `min_experts` (of mode
    top_p) and `coreset_size` (of top_c) set the bundle's defaults: the checkpoint's core_threshold or 0.6; k + groups −
    groups kept; its expert_capacity, or 48/256 of the experts and no less than k. `salient` adds the graph
    of salient-token decoding, `salient_capacity` a graph of static shapes for each M it names (docs/salient.md).
    Raises CheckpointError for what cannot be read, OutputError for what cannot be written; `out` is complete or absent.
    """
    if precision not in get_args(ExportPrecision) or routing not in (None, *get_args(RoutingChoice)):
        raise InputError(f"Precision {precision!r} or routing {routing!r} is not known; known: "
                         f"{', '.join(get_args(ExportPrecision))} and {', '.join(get_args(RoutingChoice))}.")
    source = (checkpoint if isinstance(checkpoint, Checkpoint)
              else Checkpoint(resolve_checkpoint(checkpoint), layers))
    d = source.description
    kept, how = choose_precision(d, precision, dense_precision, group_size)
    dtype = DTYPES[kept]
    route, warnings = choose_routing(source, routing, block_length,
                                     {"top_p": top_p, "min_experts": min_experts, "coreset_size": coreset_size})
    if salient_capacity and not salient:
        raise InputError("salient_capacity adds to the salient graph; give salient (--salient), too.")
    check_capacities(d, route, tuple(salient_capacity))
    width = padded_width(d.hidden_size, d.moe.expert_width, dtype.itemsize, how) if d.moe else 0
    total = _weight_bytes(d, width, dtype, how)
    written = 0

    def advance(count: int) -> None:
        nonlocal written
        written += count
        tell("weights", written, total)

    tell = report or (lambda phase, done, of: None)
    with BundleWriter(out, overwrite, bytes_needed=total) as writer:
        tokenizer, said = copy_text(source, writer)  # first: what is wrong with it is known within a second
        tell("trace", 0, 0)
        model = trace_denoiser(d, route, dtype, width, how)
        stream = WeightStream(source, writer, model, dtype, width, advance, how)
        stream.write_dense()
        expert_entry = stream.write_experts()
        tell("check", 0, 0)
        graph = save_graph(model, writer, GRAPH_FILE)
        if salient:
            tell("trace salient steps", 0, 0)
        salient_entry = (export_salient(model, d, route, dtype, width, tuple(salient_capacity), writer, how)
                         if salient else None)
        licence = copy_licence(source.folder, writer)
        name = source_name(source.folder if isinstance(checkpoint, Checkpoint) else checkpoint)
        manifest = Manifest(
            created_by=f"dmoe-export {__version__}", model=d, routing=route, precision=kept,
            checkpoint=CheckpointEntry(identity=identity(source, stream.parts), parts=stream.parts,
                                       layers_total=source.full_description.num_layers, source=name),
            denoiser=graph, salient=salient_entry, experts=expert_entry, tokenizer=tokenizer,
            files=writer.entries, engines=[], decode_defaults=source.decode_defaults,
            warnings=[without_path(w, source.folder, name)
                      for w in (*source.warnings, *warnings, *said, *licence.warnings)])
        (writer.folder / CARD_NAME).write_text(model_card(manifest, licence), encoding="utf-8")
        writer.seal(manifest)
    source.reader.close()
    return open_bundle(out, verify="sizes")


def _weight_bytes(d: ModelDescription, width: int, dtype: torch.dtype, how: ExpertQuantisation | None) -> int:
    """About what the data files will take."""
    per_weight = how.bits / 8 + dtype.itemsize / how.group_size if how else dtype.itemsize
    experts = int(3 * d.hidden_size * width * d.moe.num_experts * per_weight) if d.moe else 0
    shared = 3 * d.hidden_size * d.moe.shared_width if d.moe else 0
    attention = d.hidden_size * d.head_dim * 2 * (d.num_heads + d.num_kv_heads)
    dense = 2 * d.vocab_size * d.hidden_size + 3 * d.hidden_size * d.dense_width * d.moe_layers.start
    return (len(d.moe_layers) * experts
            + dtype.itemsize * (len(d.moe_layers) * shared + d.num_layers * attention + dense))
