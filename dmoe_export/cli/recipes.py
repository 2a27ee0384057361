"""What a recipe says, under what was said on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem
from rich.table import Table

from ..bundle.manifest import Manifest
from ..errors import InputError
from ..recipe import Recipe, load_recipe, recipe_names
from .output import console, say

BUILT = Path("engines")
"""Where bundles built from recipes land, below the current folder."""


def with_recipe(context: click.Context, recipe: Recipe, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a command with the recipe's values where the command line gave none."""
    said = {name for name in options if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    wanted = {name: value for name, value in recipe.options().items() if name in options and name not in said}
    if "flavour" in said and options["flavour"] != recipe.engine.flavour:
        wanted.pop("targets", None)  # another flavour cannot be held to these targets
    if "routing" in said and options["routing"] != recipe.routing.mode:
        for name in ("coreset_top_p", "min_experts", "coreset_size"):  # settings of the recipe's mode
            wanted.pop(name, None)
    return options | wanted


def of_decoding(recipe: Recipe | None) -> dict[str, Any]:
    """What `export_checkpoint` is told of decoding."""
    return {"decode_defaults": recipe.decode, "presets": recipe.presets} if recipe else {}


def check_bundle(recipe: Recipe, bundle: Path, manifest: Manifest) -> None:
    """Refuse a bundle that was exported another way than the recipe says (InputError).

    What it says of decoding is the bundle's own; where a recipe differs, standard error says so.
    """
    routing = manifest.routing
    wanted = None if recipe.routing.mode == "auto" else recipe.routing.mode
    for what, ours, theirs in (("routing", wanted, routing.mode),
                               ("block length", recipe.routing.block_length, routing.block_length)):
        if ours not in (None, theirs):
            raise InputError(f"{bundle} was exported with {what} {theirs} and recipe {recipe.name} says {ours}; build "
                             "it without the recipe, or export it again.")
    if recipe.multi_block_editing and not manifest.denoiser.opens_blocks:
        say(f"dmoe-export: warning: {bundle} was exported without --multi-block-editing, which recipe {recipe.name} "
            "has; it comes with an export.", err=True)
    if (recipe.decode.items() - manifest.decode_defaults.items()
            or any(manifest.presets.get(name) != values for name, values in recipe.presets.items())):
        say(f"dmoe-export: warning: {bundle} keeps its own decode defaults and presets; those of recipe {recipe.name} "
            "come with an export.", err=True)


def complete_recipe(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of the recipes that come with the package, and files."""
    names = [name for name in recipe_names() if name.startswith(incomplete)]
    return [*map(CompletionItem, names), CompletionItem(incomplete, type="file")]


def list_recipes(as_json: bool) -> None:
    """Print the recipes that come with the package."""
    recipes = [load_recipe(name) for name in recipe_names()]
    if as_json:
        click.echo(json.dumps([recipe.model_dump(mode="json", exclude={"file"}) for recipe in recipes]))
        return
    table = Table("recipe", "checkpoint", "exported as", "built for", show_lines=True)
    table.columns[0].no_wrap, table.columns[1].overflow = True, "fold"
    for r in recipes:
        sizes = f"batch {r.profiles.batch}, prefill {r.profiles.prefill}, context {r.profiles.context}"
        exported = f"{r.precision}, {r.routing.mode}, block {r.routing.block_length or 'auto'}"
        if r.presets:
            exported += f", presets {', '.join(r.presets)}"
        table.add_row(r.name, r.checkpoint, exported,
                      f"{r.engine.flavour} {' '.join(r.engine.targets)}, {sizes}")
    console().print(table)
