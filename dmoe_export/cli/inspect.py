"""`dmoe-export inspect`: what a bundle holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from ..bundle.consistent import part_bytes
from ..bundle.hub import resolve_bundle
from ..bundle.manifest import Manifest
from ..bundle.reader import open_bundle
from ..description import ITEMSIZES, RUNTIME_SETTINGS, AttentionDescription, ModelDescription
from ..fit.largest import Verdict
from ..runtime.cpu.products import told_products
from ..runtime.residency.budget import plan_budget
from ..words import visible
from .help import SETTINGS, Verb, option
from .inspect_fit import cannot_run, fit_options, show, verdicts
from .options import JSON, VERIFY, seal_options
from .output import console, say


@click.command(cls=Verb, context_settings=SETTINGS, examples=(
    "dmoe-export inspect sample.bundle",
    "dmoe-export inspect sample.bundle --fit --memory 8G --expert-budget 25% --json"))
@click.argument("bundle", type=click.Path(path_type=Path))
@option("--expert-budget", metavar="SIZE", group="residency",
        help="Predict the memory of generating under this budget, such as 4G or 25%")
@fit_options
@VERIFY
@seal_options
@JSON
def inspect(bundle: Path, verify: Any, expert_budget: str | None, as_json: bool, expect_sha256: str | None,
            trusted_key: Path | None, **fit: Any) -> None:
    """Verify BUNDLE and show its model, routing, sizes, ops and files; with --fit, whether it can run here."""
    opened = open_bundle(resolve_bundle(bundle), verify, expect_sha256=expect_sha256, trusted_key=trusted_key)
    manifest = opened.manifest
    found, left_out = verdicts(manifest, expert_budget=expert_budget, **fit), cannot_run(manifest, expert_budget)
    summary, moe = sizes(manifest) | prediction(manifest, expert_budget), manifest.model.moe
    if as_json:
        click.echo(json.dumps({"bundle": str(bundle), "verified": verify, "sha256": opened.sha256, "sizes": summary,
                               "cpu_products": told_products(manifest), **_fit_of(found, left_out),
                               "manifest": manifest.model_dump(mode="json")}))
        return
    if found:
        show(found, left_out)
        return
    out = console()
    out.print(_table("Model", {
        "family": f"{manifest.model.family} ({manifest.model.architecture})", "precision": manifest.precision_in_words,
        "layers": f"{manifest.model.num_layers} of {manifest.checkpoint.layers_total}, "
                  f"{len(manifest.model.moe_layers)} with experts",
        "hidden": manifest.model.hidden_size, "vocabulary": manifest.model.vocab_size,
        **_heads(manifest.model),
        "experts": "none: a dense model" if moe is None else (
            f"{moe.num_experts}, {moe.experts_per_token} per token, width {moe.expert_width}, {moe.num_groups} groups "
            f"({moe.groups_kept} kept), {moe.score_function} scores"),
        "attention": manifest.model.attention.replace("_", " ") + (
            ", logits shifted by one position" if manifest.model.logit_shift else ""),
        "positions": manifest.model.max_positions,
        "mask id": "none" if manifest.model.mask_id is None else manifest.model.mask_id,
        "eos ids": ", ".join(map(str, manifest.model.eos_ids)),
        **({"delete and split tokens": f"{edit.delete}, {edit.split}"} if (edit := manifest.model.edit_tokens) else {}),
        **({"multi-block editing": "yes (edit_blocks)"} if manifest.denoiser.opens_blocks else {}),
        "decode defaults": _listed(manifest.decode_defaults),
        **{f"preset {name}": _listed(values) for name, values in manifest.presets.items()},
        "tokenizer": "yes" if manifest.tokenizer else "none: use --prompt-ids",
        "checkpoint": f"{manifest.checkpoint.source}, {manifest.checkpoint.identity[:16]}…",
        "made by": manifest.created_by, "sha256 of manifest.json": opened.sha256}))
    routing = manifest.routing
    because = routing.reason or ("not said" if moe else "")
    blocks = {**({"because": because} if because else {}), "block length": manifest.step_tokens}
    if routing.block_length != manifest.step_tokens:  # experts are chosen in parts of a canvas
        blocks["block length of routing"] = routing.block_length
    out.print(_table("Blocks", blocks) if moe is None else _table("Routing", {
        "mode": routing.mode, **blocks, **{name: getattr(routing, name) for name in RUNTIME_SETTINGS[routing.mode]}}))
    for sentence in manifest.warnings:
        say(f"Warning of the export: {sentence}")
    out.print(_table("Sizes", {name.replace("_", " "): f"{value:,}" for name, value in summary.items()}))
    out.print(_table("Products on this CPU, --cpu-products", told_products(manifest)))
    ops = Table("op", "domain", "version", "nodes", title="Custom ops")
    for op in manifest.denoiser.ops:
        ops.add_row(_cell(op.name), _cell(op.domain), str(op.version), str(op.count))
    if manifest.denoiser.ops:
        out.print(ops)
    if manifest.engines:
        out.print(_engines(manifest))
    files = Table("file", "bytes", "sha256", title=f"Files (verified: {verify})")
    for entry in manifest.files:
        files.add_row(_cell(entry.path), f"{entry.size:,}", entry.sha256[:16] + "…")
    files.columns[0].overflow = "fold"
    out.print(files)


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items()) or "none"


def _heads(model: ModelDescription) -> dict[str, str]:
    """Geometry of attention, a line for each kind of layer; and of the canvas."""
    def said(one: AttentionDescription) -> str:
        window = f", window {one.window}" if one.window else ""
        return f"{model.num_heads} query, {one.num_kv_heads} key/value of {one.head_dim}{window}"

    other = model.global_attention
    found = {"heads": said(model.usual_attention)}
    if other:
        layers = ", ".join(map(str, other.layers[:8])) + (", …" if len(other.layers) > 8 else "")
        found[f"heads of layers {layers}"] = said(other.attention)
    return found | ({"canvas": f"{model.canvas.length} random tokens"} if model.canvas else {})


def _fit_of(found: list[Verdict], left_out: dict[str, str]) -> dict[str, Any]:
    """For JSON; nothing without --fit."""
    told = [{**verdict.model_dump(mode="json"), "host_bytes": verdict.prediction.host_bytes,
             "anonymous_bytes": verdict.prediction.anonymous_bytes,
             "device_bytes": verdict.prediction.device_bytes} for verdict in found]
    return {"fit": told, "fit_left_out": left_out} if found else {}


def sizes(manifest: Manifest) -> dict[str, int]:
    """Bytes a user plans with."""
    model = manifest.model
    return {
        "bundle_bytes": sum(entry.size for entry in manifest.files),
        **{f"{part}_bytes": value for part, value in part_bytes(
            model, manifest.formats, manifest.precision).items()},
        "bytes_per_expert": manifest.bytes_per_expert,
        "expert_bytes": manifest.bytes_per_expert * (model.moe.num_experts if model.moe else 0) * len(model.moe_layers),
        "cache_bytes_per_token": model.cached_values * ITEMSIZES[manifest.precision],
    }


def prediction(manifest: Manifest, expert_budget: str | None) -> dict[str, int]:
    """What generating takes in memory under a budget, beside the interpreter and the cache; empty without one.

    Raises RequestError as `plan_budget` does.
    """
    budget = plan_budget(manifest, expert_budget)
    if budget is None:
        return {}
    dense = sum(entry.size for entry in manifest.files if entry.path == f"{manifest.denoiser.file}.data")
    kept = min(budget.bytes, sizes(manifest)["expert_bytes"])
    return {"dense_weight_bytes": dense, "expert_budget_bytes": kept, "resident_experts_per_layer": budget.residents,
            "predicted_weight_memory_bytes": dense + kept}


def _engines(manifest: Manifest) -> Table:
    """What the engine files are for."""
    table = Table("file", "graph", "made by", "targets", "plugins", "bound at run time", "batch", "tokens", "context",
                  title="Engines")
    for engine in manifest.engines:
        most = engine.profiles[0]  # the widest
        outside = sum(weight.bytes for weight in engine.weight_inputs)
        table.add_row(_cell(engine.file), _cell(engine.graph or manifest.denoiser.file),
                      _cell(f"{engine.flavour} {engine.version}"), _cell(" ".join(engine.targets)),
                      str(engine.plugin_nodes), f"{outside:,}", str(most.batch[2]), str(most.tokens[2]),
                      str(most.past[2]))
    for column in table.columns:
        column.overflow = "fold"  # a number or a name cut short is of no use
    return table


def _table(title: str, rows: dict[str, Any]) -> Table:
    table = Table(title=title, show_header=False)
    for name, value in rows.items():
        table.add_row(name, _cell(value))
    return table


def _cell(value: Any) -> Text:
    """As it is: no markup, nothing that steers a terminal."""
    return Text(visible(str(value)))
