"""`dmoe-export build`: checkpoint or bundle → TensorRT engine files in a bundle."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

import click
from pydantic_core import to_jsonable_python

from ..bundle.engines import add_engine, copied_bundle, engine_file
from ..bundle.hub import fetched_bundle
from ..bundle.manifest import MANIFEST_NAME
from ..bundle.place import check_target
from ..bundle.reader import Bundle, open_bundle
from ..engine.recipe import load_recipe
from ..engine.settings import BuildSettings, parse_size, parse_targets
from ..errors import DmoeError, InputError, MissingRequirementError
from ..hub import hub_id
from .export import as_number, warn
from .options import seal_options
from .progress import byte_bar, step_bar
from .recipes import BUILT, check_bundle, list_recipes, with_recipe

EXPORT_OPTIONS = {"routing": "routing", "block_length": "block_length", "layers": "layers", "coreset_top_p": "top_p",
                  "min_experts": "min_experts", "coreset_size": "coreset_size", "dense_precision": "dense_precision",
                  "group_size": "group_size"}
"""Options that belong to the export of a checkpoint, and what `export_checkpoint` calls them."""


@click.command()
@click.argument("source", metavar="CHECKPOINT|BUNDLE", required=False)
@click.option("--recipe", "recipe_name", metavar="NAME|FILE",
              help="Take checkpoint and options from a recipe; what the command line says wins.")
@click.option("--list-recipes", "listing", is_flag=True, help="Show the recipes and stop.")
@click.option("--out", type=click.Path(path_type=Path),
              help="Bundle to write; needed for a checkpoint [with a recipe: engines/NAME.bundle]. A bundle without "
                   "--out gets the engine in place.")
@click.option("--precision", type=click.Choice(["fp32", "fp16", "bf16", "int8", "int4"]),
              help="Of the export of a checkpoint [fp16]; int8, int4: of the routed experts' weights alone; a bundle "
                   "keeps its own.")
@click.option("--dense-precision", type=click.Choice(["fp32", "fp16", "bf16"]),
              help="Of the export of a checkpoint, with int8 or int4: of everything else [fp16].")
@click.option("--group-size", type=click.Choice(["32", "64", "128"]), callback=as_number,
              help="Of the export of a checkpoint, with int8 or int4: weights that share a scale.")
@click.option("--flavour", type=click.Choice(["auto", "tensorrt", "tensorrt-rtx"]), default="auto", show_default=True,
              help="auto: TensorRT where it and a GPU are found, else TensorRT-RTX, which needs no GPU.")
@click.option("--targets", help="Compute capabilities [TensorRT-RTX: sm80,sm86,sm89,sm120; TensorRT: this GPU].")
@click.option("--split-targets", is_flag=True, help="One engine file per target instead of one for all.")
@click.option("--max-batch", default=1, show_default=True, help="Most rows of a batch.")
@click.option("--max-prefill", type=click.IntRange(1),
              help="Most prompt tokens of a row in one forward [512, full-canvas models: the context].")
@click.option("--max-context", type=click.IntRange(1),
              help="Most cached tokens of a row [4096, full-canvas models 2048; or what the model takes].")
@click.option("--experts", type=click.Choice(["external", "inline", "resident"]), default="external",
              show_default=True,
              help="external: routed experts and vocabulary matrices stay in the bundle's files and are bound at run "
                   "time; inline: all weights go into the engine; resident: external, and the device holds as many "
                   "experts as its budget allows.")
@click.option("--experts-op", type=click.Choice(["plugin", "onnx"]), default="plugin", show_default=True,
              help="Who computes the experts: our plugin, or standard ops in rounds of experts.")
@click.option("--experts-capacity", type=int, help="Experts in one round of --experts-op onnx.")
@click.option("--workspace", default="4G", show_default=True, help="Device scratch memory the builder may plan with.")
@click.option("--builder-optimization-level", type=int, help="0 … 5 [TensorRT's default].")
@click.option("--hardware-compatible", is_flag=True, help="TensorRT only: run on Ampere and later GPUs.")
@click.option("--version-compatible", is_flag=True, help="TensorRT only: run on later versions of TensorRT.")
@click.option("--refit", is_flag=True, help="TensorRT only, with --experts inline: weights can be replaced later.")
@click.option("--allow-fallback", is_flag=True, help="Let custom nodes become ONNX bodies where plugins are missing.")
@click.option("--plugin-library", type=click.Path(path_type=Path), help="libdmoe_plugins.so [made by `make plugins`].")
@click.option("--routing", type=click.Choice(["auto", "token", "top_p", "top_c"]),
              help="Of the export of a checkpoint [auto: as it was trained, by its config.json].")
@click.option("--block-length", type=int,
              help="Of the export of a checkpoint [block_size of its config.json, or 32].")
@click.option("--layers", type=int, help="Of the export of a checkpoint: keep the first N layers.")
@click.option("--coreset-top-p", type=float, help="Of the export of a checkpoint: default p of top_p routing.")
@click.option("--min-experts", type=int, help="Of the export of a checkpoint: default least coreset size.")
@click.option("--coreset-size", type=int, help="Of the export of a checkpoint: default C of top_c routing.")
@click.option("--verify", type=click.Choice(["full", "sizes"]), default="full", show_default=True,
              help="What of a bundle is compared with its manifest first.")
@seal_options
@click.option("--force", is_flag=True, help="Replace an existing bundle at --out.")
@click.option("--dry-run", is_flag=True, help="Check everything and show the plan, write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def build(context: click.Context, source: str | None, recipe_name: str | None, listing: bool, out: Path | None,
          force: bool, dry_run: bool, as_json: bool, split_targets: bool, plugin_library: Path | None, verify: Any,
          expect_sha256: str | None, trusted_key: Path | None, **options: Any) -> None:
    """Build engine files from a CHECKPOINT (exported first) or BUNDLE, a folder or hub id, or from a recipe."""
    if listing:
        return list_recipes(as_json)
    if source is None and recipe_name is None:
        raise InputError("Name a CHECKPOINT, a BUNDLE or a --recipe; --list-recipes shows the known ones.")
    recipe = load_recipe(recipe_name) if recipe_name else None
    source = _fetched(source, out, dry_run) if source else None
    if recipe:
        options = with_recipe(context, recipe, options)
        source = source or recipe.checkpoint_source
    assert source
    find_plugins, find_flavour = _engine_parts()
    start = time.perf_counter()
    precision = options.pop("precision")
    export_options = {name: options.pop(name) for name in EXPORT_OPTIONS}
    name = options.pop("flavour")
    flavour = find_flavour(None if name == "auto" else name)
    settings = _settings(options)
    flavour.check_flags(settings.flags)  # before an export of many minutes
    flavour.targets(settings.targets)
    if not (Path(source) / MANIFEST_NAME).is_file():
        if expect_sha256 is not None or trusted_key is not None:
            raise InputError(f"{source} is no bundle; --expect-sha256 and --trusted-key belong to one, so leave them "
                             "out.")
        find_plugins(settings, plugin_library)
        out = out or (BUILT / f"{recipe.name}.bundle" if recipe else None)
        if out is None:
            raise InputError(f"{source} is no bundle; exporting it as a checkpoint needs --out BUNDLE.")
        check_target(out, force)
        if dry_run:
            raise InputError(f"--dry-run plans from a bundle; export {source} first with: dmoe-export export {source} "
                             f"--out {out} --precision {precision or 'fp16'}.")
        bundle = _export(source, out, precision or "fp16", export_options, force, as_json)
        place: Any = contextlib.nullcontext(bundle.folder)
    else:
        given = [f"--{key.replace('_', '-')}" for key in EXPORT_OPTIONS if context.params[key] is not None]
        if given:
            raise InputError(f"{' and '.join(given)} belong to the export of a checkpoint; {source} is a bundle.")
        bundle = open_bundle(source, verify, expect_sha256=expect_sha256, trusted_key=trusted_key)
        if recipe:
            check_bundle(recipe, Path(source), bundle.manifest)
        if precision not in (None, bundle.manifest.export_precision):
            raise InputError(f"{source} is {bundle.manifest.export_precision}, not {precision}; precision is decided "
                             f"at export: dmoe-export export CHECKPOINT --precision {precision}.")
        place = copied_bundle(bundle, out, force) if out and not dry_run else contextlib.nullcontext(bundle.folder)
    try:
        with place as folder:
            results = _engines(bundle, folder, settings, flavour, plugin_library, split_targets, dry_run, as_json)
    except DmoeError:
        if bundle.folder == out:
            click.echo(f"The bundle {out} was exported and is complete; it has no engine.", err=True)
        raise
    _show(out or bundle.folder, results, dry_run, as_json, time.perf_counter() - start)


def _engine_parts() -> tuple[Any, Any]:
    try:
        from ..engine.build import find_plugins
        from ..engine.flavour import find_flavour
    except ModuleNotFoundError as error:
        raise MissingRequirementError(f"Building engines needs {error.name}; install with: "
                                      "pip install 'dmoe-export[rtx]' or 'dmoe-export[tensorrt]'.") from None
    return find_plugins, find_flavour


def _settings(options: dict[str, Any]) -> BuildSettings:
    targets, workspace = options.pop("targets"), options.pop("workspace")
    flags = tuple(f for f in ("hardware-compatible", "version-compatible", "refit") if options.pop(f.replace("-", "_")))
    return BuildSettings(targets=parse_targets(targets) if targets is not None else (), workspace=parse_size(workspace),
                         optimization_level=options.pop("builder_optimization_level"), flags=flags, **options)


def _fetched(source: str, out: Path | None, dry_run: bool) -> str:
    """The folder of a bundle that was named by its hub id; any other source as it is."""
    name = hub_id(source)
    folder = fetched_bundle(name) if name else None
    if folder and out is None and not dry_run:
        raise InputError(f"{source} is a bundle on the hub, and engines are not put into the hub's cache; give --out "
                         "BUNDLE.")
    return str(folder) if folder else source


def _export(source: str, out: Path, precision: Any, options: dict[str, Any], force: bool, as_json: bool) -> Bundle:
    from .. import export_checkpoint  # needs torch: only for a checkpoint

    chosen = {EXPORT_OPTIONS[name]: value for name, value in options.items() if value is not None}
    if precision in ("int8", "int4"):
        chosen.setdefault("dense_precision", "fp16")
    with byte_bar("read", 0, shown=not as_json) as report:
        bundle = export_checkpoint(source, out, precision=precision, overwrite=force, report=report, **chosen)
    warn(bundle)
    return bundle


def _engines(bundle: Bundle, folder: Path, settings: BuildSettings, flavour: Any, library: Path | None, split: bool,
             dry_run: bool, as_json: bool) -> list[dict[str, Any]]:
    """Plan all engines, then build and add one after the other."""
    from dataclasses import replace

    from ..engine.build import build_engine, known_before, plan_build

    targets = flavour.targets(settings.targets)
    groups = [(t,) for t in targets] if split else [targets]
    plans = [plan_build(bundle, replace(settings, targets=group), flavour, library) for group in groups]
    results = []
    for plan in plans:
        start = time.perf_counter()
        if dry_run:
            build = plan.library.build if plan.library else None
            results.append(to_jsonable_python(
                known_before(plan) | {"plugin_build": build, "plugin_nodes": plan.network.plugin_nodes}))
            continue
        with engine_file(folder, plan.file_name) as path, step_bar(plan.file_name, shown=not as_json) as report:
            entry = build_engine(plan, path, report)
            size = path.stat().st_size
            add_engine(folder, path, entry)
        results.append(entry.model_dump(mode="json") | {"bytes": size, "seconds": time.perf_counter() - start})
    return results


def _show(folder: Path, results: list[dict[str, Any]], dry_run: bool, as_json: bool, seconds: float) -> None:
    if as_json:
        click.echo(json.dumps({"bundle": str(folder), "dry_run": dry_run, "seconds": seconds, "engines": results}))
        return
    for engine in results:
        outside = sum(weight["bytes"] for weight in engine["weight_inputs"])
        nodes = f"{engine['plugin_nodes']} plugins" + (
            f", {engine['fallback_nodes']} custom nodes as ONNX bodies" if engine.get("fallback_nodes") else "")
        size = "" if dry_run else f"{engine['bytes'] / 1e6:.1f} MB, {engine['seconds']:.1f} s, "
        click.echo(f"{'Would build' if dry_run else 'Built'} {folder / engine['file']} with {engine['flavour']} "
                   f"{engine['version']} for {', '.join(engine['targets'])} ({size}{nodes}, {outside / 1e6:.1f} MB of "
                   "weights bound at run time)")
