"""`dmoe-export bench export` and `bench build`: time and peak memory of the verbs, each in a process of its own."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from rich.table import Table

from ..bench.children import BUILDS, BuildBench, Child, ExportBench, run_build, run_export
from ..bench.record import Started
from ..words import count, size
from .bench_common import outcome
from .export import PRECISIONS
from .help import SETTINGS, Verb, option
from .options import JSON, OUT
from .output import console
from .progress import step_bar

_geometry = option("--geometry", default="llada2.0-mini", metavar="NAME", group="model", help="A published size")
_layers = option("--layers", type=click.IntRange(min=1), default=4, group="model",
                 help="The first so many layers of it")
_work = option("--work", type=click.Path(path_type=Path), metavar="FOLDER", group="place", shown="a temporary one",
               help="Folder for checkpoint and bundle, twice the model")
_keep = option("--keep", is_flag=True, group="place", help="Keep what lies in --work")


@click.command(cls=Verb, context_settings=SETTINGS, examples=(
    "dmoe-export bench export --geometry tiny --layers 2",
    "dmoe-export bench export --geometry tiny --layers 2 --precision fp16 --json"))
@_geometry
@_layers
@option("--precision", type=click.Choice(PRECISIONS), default="fp32", group="model", help="How weights are stored")
@_work
@_keep
@OUT
@JSON
def export(geometry: str, layers: int, precision: str, work: Path | None, keep: bool, out: Path | None,
           as_json: bool) -> None:
    """Time and peak memory of an export, and of a short answer from its bundle."""
    started = Started("bench export")
    with _folder(work, keep) as folder, _telling("export", not as_json) as tell:
        result = run_export(folder, geometry, layers, precision, tell)
    outcome(started.document(result), out, as_json, lambda: _show_export(result))


@click.command(cls=Verb, context_settings=SETTINGS, examples=(
    "dmoe-export bench build --geometry tiny --layers 2 --targets sm89",
    'dmoe-export bench build --geometry tiny --layers 2 --targets sm89 --variant "external, onnx"'))
@_geometry
@_layers
@option("--targets", default="sm80,sm86,sm89,sm120", metavar="SM,…", group="engine",
        help="GPU generations by compute capability, separated by commas")
@option("--variant", "variants", multiple=True, type=click.Choice(list(BUILDS)), group="engine",
        shown="both external ones", help="Where weights lie and who computes the experts; may be given again")
@_work
@_keep
@OUT
@JSON
def build(geometry: str, layers: int, targets: str, variants: tuple[str, ...], work: Path | None, keep: bool,
          out: Path | None, as_json: bool) -> None:
    """Time and peak memory of building engines; needs no GPU."""
    started = Started("bench build")
    with _folder(work, keep) as folder, _telling("build", not as_json) as tell:
        result = run_build(folder, geometry, layers, targets, list(variants or list(BUILDS)[:2]), tell)
    outcome(started.document(result), out, as_json, lambda: _show_build(result))


@contextmanager
def _folder(work: Path | None, keep: bool) -> Iterator[Path]:
    """A temporary folder, or a new one inside `work` that is removed in the end unless it is kept."""
    if work is None:
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)
        return
    work.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=work))
    try:
        yield folder
    finally:
        if not keep:
            shutil.rmtree(folder)


@contextmanager
def _telling(label: str, shown: bool) -> Iterator[Callable[[str], None]]:
    with step_bar(label, shown) as report:
        yield lambda what: report(what, 0, 0)


def _show_export(result: ExportBench) -> None:
    table = Table("", "seconds", "peak memory", "of these not file pages",
                  title=f"{result.model}, {_layers_of(result)}: {size(result.checkpoint_bytes)} checkpoint "
                        f"to a {result.precision} bundle of {size(result.bundle_bytes)}")
    table.add_row("export", *_cells(result.export))
    if result.generate:
        table.add_row(count(result.generate_tokens or 0, "token"), *_cells(result.generate))
    console().print(table)
    limits = result.limits
    click.echo(f"limits: write {limits.write_gb_per_s:.2f} GB/s, sha256 {limits.sha256_gb_per_s:.2f} GB/s; the export "
               f"reached {result.limit_share:.0%} of them")


def _show_build(result: BuildBench) -> None:
    table = Table("experts, op", "seconds", "peak memory", "of these not file pages", "engine", "bound at run time",
                  title=f"{result.model}, {_layers_of(result)}, fp16, {result.targets}: {result.flavour} "
                        f"{result.version}")
    for build in result.builds:
        table.add_row(build.variant, *_cells(build.run), size(build.engine_bytes),
                      size(build.bytes_bound_at_run_time))
    console().print(table)


def _layers_of(result: ExportBench | BuildBench) -> str:
    return count(result.layers, "layer") if result.layers else "all layers"


def _cells(run: Child) -> tuple[str, str, str]:
    return f"{run.seconds:.1f}", size(run.peak_rss_bytes), size(run.peak_anonymous_bytes)
