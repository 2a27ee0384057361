"""`dmoe-export export`: checkpoint → bundle."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, get_args

import click

from ..bundle.reader import Bundle
from ..description import ExportPrecision, Precision, RoutingChoice
from ..errors import InputError
from ..recipe import load_recipe
from ..words import count, size
from .help import SETTINGS, Verb, folders, option
from .options import JSON
from .output import say
from .progress import byte_bar
from .recipes import complete_recipe, of_decoding, with_recipe

PRECISIONS, COMPUTE_TYPES, ROUTINGS = get_args(ExportPrecision), get_args(Precision), get_args(RoutingChoice)


def as_number(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """A chosen word as the number it is (click's choices are words)."""
    return None if value is None else int(value)


def as_ids(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """Token ids separated by commas; raises InputError for anything else."""
    return _ids(value, "Edit tokens {!r} are not two token ids; give DELETE and SPLIT, such as 156930,156931.")


def as_end_ids(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """The same."""
    return _ids(value, "End ids {!r} are not token ids; give them with commas between, such as 151643,151645.")


def _ids(value: str | None, wrong: str) -> tuple[int, ...] | None:
    if value is None:
        return None
    parts = value.split(",")
    if not all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts):
        raise InputError(wrong.format(value))
    return tuple(map(int, parts))


def warn(bundle: Bundle) -> None:
    """On stderr, what a fresh export has to say."""
    for sentence in bundle.manifest.warnings:
        say(f"dmoe-export: warning: {sentence}", err=True)


@click.command(cls=Verb, context_settings=SETTINGS, examples=(
    "dmoe-export export samples/tiny-dmoe --out sample.bundle",
    "dmoe-export export samples/tiny-dmoe --out small.bundle --precision fp16 --layers 2"))
@click.argument("checkpoint", required=False, shell_complete=folders)
@option("--recipe", "recipe_name", metavar="NAME|FILE", group="recipe", shell_complete=complete_recipe,
        help="Take checkpoint, formats, routing, decode defaults and presets from a recipe; what the command line says "
        "wins")
@option("--out", required=True, type=click.Path(path_type=Path), metavar="BUNDLE", group="output",
        help="Folder of the bundle to write; needed")
@option("--force", is_flag=True, group="output", help="Replace an existing bundle")
@JSON
@option("--precision", type=click.Choice(PRECISIONS), group="numbers", shown="as the checkpoint stores them, else fp32",
        help="How weights are stored; bf16 and fp16 are exact for checkpoints of that type")
@option("--compute", type=click.Choice(COMPUTE_TYPES), default="fp32", group="numbers",
        help="Type of activations and caches; fp32 is for CPUs, whatever is stored; for GPUs give the weights' own")
@option("--dense-precision", type=click.Choice(PRECISIONS), group="numbers", shown="as --precision",
        help="How linear layers are stored, all but the routed experts'")
@option("--head-precision", type=click.Choice(PRECISIONS), group="numbers",
        shown="as --dense-precision, int8 where that is int4", help="How the vocabulary head is stored")
@option("--embedding-precision", type=click.Choice(PRECISIONS), group="numbers", shown="as --dense-precision",
        help="How the embedding is stored")
@option("--group-size", type=click.Choice(["32", "64", "128"]), callback=as_number, group="numbers",
        shown="64, or 32 where that does not fit",
        help="With int8 or int4: weights that share a scale; more is smaller and less exact")
@option("--layers", type=int, group="numbers", values="at least 1", shown="all",
        help="Keep only the first so many layers, for quick checks")
@option("--routing", type=click.Choice(ROUTINGS), default="auto", group="routing",
        help="How a block's experts are chosen; auto: as the checkpoint was trained, by its config.json")
@option("--block-length", type=int, group="routing", values="at least 1",
        shown="block_size of config.json, or the family's", help="Tokens per block, of routing and decoding")
@option("--coreset-top-p", type=float, group="routing", values="between 0 and 1",
        shown="core_threshold of config.json, or 0.6",
        help="Share of a block's votes for experts that the bundle follows; higher uses more experts (routing top_p)")
@option("--min-experts", type=int, group="routing", values="at least 1",
        shown="experts per token + groups - groups kept",
        help="Fewest experts of a block; higher is slower (routing top_p)")
@option("--coreset-size", type=int, group="routing", values="at least 1",
        shown="expert_capacity of config.json, or 48/256 of the experts",
        help="Experts of a block; higher is slower (routing top_c)")
@option("--edit-tokens", callback=as_ids, metavar="DELETE,SPLIT", group="numbers",
        shown="delete_token_id and split_token_id of config.json",
        help="Token ids with which the model deletes and inserts while editing (LLaDA2.2)")
@option("--multi-block-editing", is_flag=True, group="numbers",
        help="Add an input by which finished blocks can be edited in the light of later ones (option edit_blocks of a "
             "request; LLaDA2.1)")
@option("--end-ids", callback=as_end_ids, metavar="ID,…", group="numbers",
        shown="those of config.json and generation_config.json",
        help="Token ids that end an answer, besides those of the checkpoint's files")
@option("--salient", is_flag=True, group="salient steps",
        help="Add the graph of salient steps, which recompute only tokens that changed (DyLLM)")
@option("--salient-capacity", type=int, multiple=True, metavar="M", group="salient steps",
        help="Add one of fixed sizes, for at most M recomputed tokens per layer; may be given again")
@click.pass_context
def export(context: click.Context, checkpoint: str | None, recipe_name: str | None, out: Path, force: bool,
           as_json: bool, **options: Any) -> None:
    """Export CHECKPOINT, a folder or a hub id, to a bundle: a folder that generates text without PyTorch."""
    recipe = load_recipe(recipe_name) if recipe_name is not None else None
    if recipe:
        options = with_recipe(context, recipe, options)
        checkpoint = checkpoint or recipe.checkpoint_source
    if checkpoint is None:
        raise InputError("Name a CHECKPOINT or a --recipe; dmoe-export build --list-recipes shows the known ones.")
    from .. import export_checkpoint  # needs torch: only when this verb runs

    start, top_p = time.perf_counter(), options.pop("coreset_top_p")
    with byte_bar("read", 0, shown=not as_json) as report:
        bundle = export_checkpoint(checkpoint, out, top_p=top_p, overwrite=force, report=report, **options,
                                   **of_decoding(recipe))
    manifest = bundle.manifest
    warn(bundle)
    total = sum(entry.size for entry in manifest.files)
    if as_json:
        click.echo(json.dumps({"bundle": str(bundle.folder), "sha256": bundle.sha256, "bytes": total,
                               "seconds": time.perf_counter() - start, "manifest": manifest.model_dump(mode="json")}))
        return
    why = f" ({manifest.routing.reason})" if manifest.routing.reason else ""
    routing = (f"routing {manifest.routing.mode}" if manifest.model.moe else "no experts") + why
    reason = manifest.formats.reason if options["precision"] is None else ""
    because = f" ({reason})" if reason else ""
    say(f"Exported {count(manifest.model.num_layers, 'layer')} of {manifest.model.architecture} in "
        f"{manifest.precision_in_words}{because}, {routing}, block {manifest.step_tokens}: {bundle.folder} "
        f"({size(total)}, {time.perf_counter() - start:.1f} s)")
    say(f"sha256 of its manifest.json: {bundle.sha256}")
