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
from ..engine.settings import BuildSettings, parse_size, parse_targets
from ..errors import DmoeError, InputError, MissingRequirementError
from ..extras import pip_install
from ..hub import hub_id
from ..recipe import Recipe, load_recipe
from ..words import count, size
from .export import COMPUTE_TYPES, PRECISIONS, ROUTINGS, as_end_ids, as_ids, as_number, warn
from .help import SETTINGS, Verb, folders, option
from .options import JSON, VERIFY, seal_options
from .output import say
from .progress import byte_bar, step_bar
from .recipes import BUILT, check_bundle, complete_recipe, list_recipes, of_decoding, with_recipe

EXPORT_OPTIONS = {"routing": "routing", "block_length": "block_length", "layers": "layers", "coreset_top_p": "top_p",
                  "min_experts": "min_experts", "coreset_size": "coreset_size", "dense_precision": "dense_precision",
                  "group_size": "group_size", "edit_tokens": "edit_tokens", "end_ids": "end_ids",
                  "multi_block_editing": "multi_block_editing"}
"""Options that belong to the export of a checkpoint, and what `export_checkpoint` calls them."""
EXPORT = "export of a checkpoint"


@click.command(cls=Verb, context_settings=SETTINGS, examples=(
    "dmoe-export build --list-recipes",
    "dmoe-export build samples/tiny-dmoe --out fp16.bundle --targets sm89"))
@click.argument("source", metavar="CHECKPOINT|BUNDLE", required=False, shell_complete=folders)
@option("--recipe", "recipe_name", metavar="NAME|FILE", group="recipe", shell_complete=complete_recipe,
        help="Take checkpoint and options from a recipe; what the command line says wins")
@option("--list-recipes", "listing", is_flag=True, group="recipe", help="Show the recipes and stop")
@option("--flavour", type=click.Choice(["auto", "tensorrt", "tensorrt-rtx"]), default="auto", group="engine",
        help="auto: TensorRT where it and a GPU are found, else TensorRT-RTX, which needs no GPU")
@option("--targets", metavar="SM,…", group="engine",
        shown="TensorRT-RTX: sm80,sm86,sm89,sm120; TensorRT: this GPU",
        help="GPU generations by compute capability, separated by commas")
@option("--split-targets", is_flag=True, group="engine", help="One engine file per target instead of one for all")
@option("--experts", type=click.Choice(["external", "inline", "resident"]), default="external", group="engine",
        help="external: routed experts and vocabulary matrices stay in the bundle's files and are bound at run time; "
        "inline: all weights go into the engine; resident: external, and the device holds as many experts as its "
        "budget allows")
@option("--experts-op", type=click.Choice(["plugin", "onnx"]), default="plugin", group="engine",
        help="Who computes the experts: our plugin, or standard ops in rounds of experts")
@option("--experts-capacity", type=int, group="engine", values="at least 1", shown="16, or all there are",
        help="Experts in one round of --experts-op onnx; more takes more memory and fewer rounds")
@option("--plugin-library", type=click.Path(path_type=Path), metavar="FILE", group="engine",
        shown="made by `make plugins`", help="libdmoe_plugins.so")
@option("--allow-fallback", is_flag=True, group="engine",
        help="Let custom nodes become ONNX bodies where plugins are missing; slower")
@option("--no-salient", "salient", is_flag=True, flag_value=False, default=True, group="engine",
        help="Build the denoiser's engine alone, and none of the graphs of salient steps")
@option("--max-batch", default=1, group="largest sizes", values="between 1 and 1024",
        help="Most rows of a batch; larger sizes take more device memory")
@option("--max-prefill", type=click.IntRange(1), group="largest sizes",
        shown="512, full-canvas models: the context", help="Most prompt tokens of a row in one forward pass")
@option("--max-context", type=click.IntRange(1), group="largest sizes",
        shown="4096, full-canvas models 2048; or what the model takes", help="Most cached tokens of a row")
@option("--workspace", default="4G", metavar="SIZE", group="builder",
        help="Device scratch memory the builder may plan with")
@option("--builder-optimization-level", type=int, group="builder", values="between 0 and 5",
        shown="TensorRT's", help="Higher builds longer and may run faster")
@option("--hardware-compatible", is_flag=True, group="builder",
        help="TensorRT only: run on Ampere and later GPUs")
@option("--version-compatible", is_flag=True, group="builder",
        help="TensorRT only: run on later versions of TensorRT")
@option("--refit", is_flag=True, group="builder",
        help="TensorRT only, with --experts inline: weights can be replaced later")
@option("--precision", type=click.Choice(PRECISIONS), group=EXPORT, shown="fp16",
        help="How weights are stored; int8 and int4: those of the routed experts alone; a bundle keeps its own")
@option("--dense-precision", type=click.Choice(COMPUTE_TYPES), group=EXPORT, shown="fp16",
        help="With int8 or int4: type of everything else")
@option("--group-size", type=click.Choice(["32", "64", "128"]), callback=as_number, group=EXPORT,
        shown="64, or 32 where that does not fit", help="With int8 or int4: weights that share a scale")
@option("--layers", type=int, group=EXPORT, values="at least 1", shown="all",
        help="Keep only the first so many layers")
@option("--routing", type=click.Choice(ROUTINGS), group=EXPORT, shown="auto: as it was trained, by its config.json",
        help="How a block's experts are chosen")
@option("--block-length", type=int, group=EXPORT, values="at least 1",
        shown="block_size of its config.json, or the family's", help="Tokens per block")
@option("--coreset-top-p", type=float, group=EXPORT, values="between 0 and 1", shown="as of export",
        help="Share of a block's votes for experts that is followed (routing top_p)")
@option("--min-experts", type=int, group=EXPORT, values="at least 1", shown="as of export",
        help="Fewest experts of a block (routing top_p)")
@option("--coreset-size", type=int, group=EXPORT, values="at least 1", shown="as of export",
        help="Experts of a block (routing top_c)")
@option("--edit-tokens", callback=as_ids, metavar="DELETE,SPLIT", group=EXPORT, shown="those of its config.json",
        help="Token ids with which the model deletes and inserts while editing (LLaDA2.2)")
@option("--multi-block-editing", is_flag=True, default=None, group=EXPORT,
        help="Let requests edit finished blocks in the light of later ones (option edit_blocks; LLaDA2.1)")
@option("--end-ids", callback=as_end_ids, metavar="ID,…", group=EXPORT, shown="those of its files",
        help="Token ids that end an answer, besides those of the checkpoint's files")
@VERIFY
@seal_options
@option("--out", type=click.Path(path_type=Path), metavar="BUNDLE", group="output",
        shown="with a recipe: engines/NAME.bundle",
        help="Bundle to write; needed for a checkpoint. A bundle without --out gets the engine in place")
@option("--force", is_flag=True, group="output", help="Replace an existing bundle at --out")
@option("--dry-run", is_flag=True, group="output", help="Check everything and show the plan, write nothing")
@JSON
@click.pass_context
def build(context: click.Context, source: str | None, recipe_name: str | None, listing: bool, out: Path | None,
          force: bool, dry_run: bool, as_json: bool, split_targets: bool, plugin_library: Path | None, verify: Any,
          expect_sha256: str | None, trusted_key: Path | None, **options: Any) -> None:
    """Build TensorRT engine files into a bundle.

    They are made of a BUNDLE, of a CHECKPOINT, which is exported first, or of what a recipe says; both may be folders
    or hub ids.
    """
    if listing:
        return list_recipes(as_json)
    if source is None and recipe_name is None:
        raise InputError("Name a CHECKPOINT, a BUNDLE or a --recipe; --list-recipes shows the known ones.")
    recipe = load_recipe(recipe_name) if recipe_name is not None else None
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
        find_plugins(settings, plugin_library)
        out = out or (BUILT / f"{recipe.name}.bundle" if recipe else None)
        if out is None:
            raise InputError(f"{source} is no bundle; exporting it as a checkpoint needs --out BUNDLE.")
        if expect_sha256 is not None or trusted_key is not None:
            raise InputError(f"{source} is no bundle; --expect-sha256 and --trusted-key belong to one, so leave them "
                             "out.")
        check_target(out, force)
        if dry_run:
            raise InputError(f"--dry-run plans from a bundle; export {source} first with: dmoe-export export {source} "
                             f"--out {out} {_for_gpus(precision or 'fp16', export_options['dense_precision'])}.")
        bundle = _export(source, out, precision or "fp16", export_options, recipe, force, as_json)
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
            say(f"The bundle {out} was exported and is complete; it has no engine.", err=True)
        raise
    _show(out or bundle.folder, results, dry_run, as_json, time.perf_counter() - start)


def _engine_parts() -> tuple[Any, Any]:
    try:
        from ..engine.build import find_plugins
        from ..engine.flavour import find_flavour
    except ModuleNotFoundError as error:
        raise MissingRequirementError(f"Building engines needs {error.name}; install with: "
                                      f"{pip_install('rtx')}, or {pip_install('tensorrt')}.") from None
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


def _for_gpus(precision: Any, dense: Any) -> str:
    """The options of `export` that make a bundle as `build` would."""
    compute = dense or ("fp16" if precision in ("int8", "int4") else precision)
    kept = f" --dense-precision {compute}" if precision in ("int8", "int4") else ""
    return f"--precision {precision}{kept} --compute {compute}"


def _export(source: str, out: Path, precision: Any, options: dict[str, Any], recipe: Recipe | None, force: bool,
            as_json: bool) -> Bundle:
    from .. import export_checkpoint  # needs torch: only for a checkpoint

    chosen = {EXPORT_OPTIONS[name]: value for name, value in options.items() if value is not None}
    if precision in ("int8", "int4"):
        chosen.setdefault("dense_precision", "fp16")
    elif chosen.get("dense_precision"):
        raise InputError(f"--dense-precision belongs to precision int8 or int4, and the precision is {precision}; "
                         "leave it out.")
    chosen["compute"] = chosen.get("dense_precision", precision)  # kernels of GPUs take weights in no other floats
    with byte_bar("read", 0, shown=not as_json) as report:
        bundle = export_checkpoint(source, out, precision=precision, overwrite=force, report=report, **chosen,
                                   **of_decoding(recipe))
    warn(bundle)
    return bundle


def _engines(bundle: Bundle, folder: Path, settings: BuildSettings, flavour: Any, library: Path | None, split: bool,
             dry_run: bool, as_json: bool) -> list[dict[str, Any]]:
    """Plan all engines, then build and add one after the other."""
    from dataclasses import replace

    from ..engine.build import build_engine, known_before, plan_build
    from ..engine.settings import graphs_to_build

    targets = flavour.targets(settings.targets)
    groups = [(t,) for t in targets] if split else [targets]
    plans = [plan_build(bundle, replace(settings, targets=group), flavour, library, graph) for group in groups
             for graph in graphs_to_build(settings, bundle.manifest)]
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
            written = path.stat().st_size
            add_engine(folder, path, entry)
        results.append(entry.model_dump(mode="json") | {"bytes": written, "seconds": time.perf_counter() - start})
    return results


def _show(folder: Path, results: list[dict[str, Any]], dry_run: bool, as_json: bool, seconds: float) -> None:
    if as_json:
        click.echo(json.dumps({"bundle": str(folder), "dry_run": dry_run, "seconds": seconds, "engines": results}))
        return
    for engine in results:
        outside = sum(weight["bytes"] for weight in engine["weight_inputs"])
        nodes = count(engine["plugin_nodes"], "plugin")
        if engine.get("fallback_nodes"):
            nodes += f", {count(engine['fallback_nodes'], 'custom node')} as ONNX bodies"
        took = "" if dry_run else f"{size(engine['bytes'])}, {engine['seconds']:.1f} s, "
        say(f"{'Would build' if dry_run else 'Built'} {folder / engine['file']} with {engine['flavour']} "
                   f"{engine['version']} for {', '.join(engine['targets'])} ({took}{nodes}, {size(outside)} of "
                   "weights bound at run time)")
