"""`dmoe-export export`: checkpoint → bundle."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click

from ..bundle.reader import Bundle
from .progress import byte_bar


def as_number(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """A chosen word as the number it is (click's choices are words)."""
    return None if value is None else int(value)


def warn(bundle: Bundle) -> None:
    """On stderr, what a fresh export has to say."""
    for sentence in bundle.manifest.warnings:
        click.echo(f"dmoe-export: warning: {sentence}", err=True)


@click.command()
@click.argument("checkpoint")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the bundle to write.")
@click.option("--precision", type=click.Choice(["fp32", "fp16", "bf16", "int8", "int4"]), default="fp32",
              show_default=True, help="int8, int4: of the routed experts' weights alone.")
@click.option("--dense-precision", type=click.Choice(["fp32", "fp16", "bf16"]),
              help="With int8 or int4: of everything else [fp32].")
@click.option("--group-size", type=click.Choice(["32", "64", "128"]), callback=as_number,
              help="With int8 or int4: weights that share a scale [64, or 32 where that does not fit].")
@click.option("--routing", type=click.Choice(["auto", "token", "top_p", "top_c"]), default="auto", show_default=True,
              help="How a block's experts are chosen; auto: as the checkpoint was trained, by its config.json.")
@click.option("--block-length", type=int,
              help="Tokens per block, of routing and decoding [block_size of config.json, or 32].")
@click.option("--layers", type=int, help="Keep only the first N layers, for quick checks.")
@click.option("--coreset-top-p", type=float, help="Default p of top_p routing [core_threshold of config.json, or 0.6].")
@click.option("--min-experts", type=int, help="Default least coreset size of top_p routing [k + groups - groups kept].")
@click.option("--coreset-size", type=int,
              help="Default C of top_c routing [expert_capacity of config.json, or 48/256 of the experts].")
@click.option("--salient", is_flag=True, help="Add the graph of salient-token decoding.")
@click.option("--salient-capacity", type=int, multiple=True, metavar="M",
              help="Add one of static shapes, for at most M salient rows per layer (may be repeated).")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def export(checkpoint: str, out: Path, coreset_top_p: float | None, force: bool, as_json: bool, **options: Any) -> None:
    """Export CHECKPOINT (a folder or a hub id) to a bundle."""
    from .. import export_checkpoint  # needs torch: only when this verb runs

    start = time.perf_counter()
    with byte_bar("read", 0, shown=not as_json) as report:
        bundle = export_checkpoint(checkpoint, out, top_p=coreset_top_p, overwrite=force, report=report, **options)
    manifest = bundle.manifest
    warn(bundle)
    size = sum(entry.size for entry in manifest.files)
    if as_json:
        click.echo(json.dumps({"bundle": str(bundle.folder), "sha256": bundle.sha256, "bytes": size,
                               "seconds": time.perf_counter() - start, "manifest": manifest.model_dump(mode="json")}))
        return
    routing = f"routing {manifest.routing.mode} ({manifest.routing.reason})" if manifest.model.moe else "no experts"
    click.echo(f"Exported {manifest.model.num_layers} layers of {manifest.model.architecture} in "
               f"{manifest.precision_in_words}, {routing}, block {manifest.routing.block_length}: {bundle.folder} "
               f"({size / 1e6:.1f} MB, {time.perf_counter() - start:.1f} s)\n"
               f"sha256 of its manifest.json: {bundle.sha256}")
