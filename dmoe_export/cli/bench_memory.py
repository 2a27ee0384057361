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
from .bench_common import outcome
from .output import console
from .progress import step_bar

_geometry = click.option("--geometry", default="llada2.0-mini", show_default=True, help="A published size.")
_layers = click.option("--layers", type=click.IntRange(min=1), default=4, show_default=True, help="The first so many.")
_work = click.option("--work", type=click.Path(path_type=Path),
                     help="Folder for checkpoint and bundle, twice the model [a temporary one].")
_keep = click.option("--keep", is_flag=True, help="Keep what lies in --work.")
_out = click.option("--out", type=click.Path(path_type=Path), help="Write the JSON here.")
_json = click.option("--json", "as_json", is_flag=True, help="Print the JSON.")


@click.command()
@_geometry
@_layers
@click.option("--precision", type=click.Choice(["fp32", "fp16", "bf16", "int8", "int4"]), default="fp32",
              show_default=True)
@_work
@_keep
@_out
@_json
def export(geometry: str, layers: int, precision: str, work: Path | None, keep: bool, out: Path | None,
           as_json: bool) -> None:
    """Time and peak memory of an export, and of a short answer from its bundle."""
    started = Started("bench export")
    with _folder(work, keep) as folder, _telling("export", not as_json) as tell:
        result = run_export(folder, geometry, layers, precision, tell)
    outcome(started.document(result), out, as_json, lambda: _show_export(result))


@click.command()
@_geometry
@_layers
@click.option("--targets", default="sm80,sm86,sm89,sm120", show_default=True)
@click.option("--variant", "variants", multiple=True, type=click.Choice(list(BUILDS)),
              help="May be given again [both external ones].")
@_work
@_keep
@_out
@_json
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
                  title=f"{result.model}, {result.layers or 'all'} layers: {_size(result.checkpoint_bytes)} checkpoint "
                        f"to a {result.precision} bundle of {_size(result.bundle_bytes)}")
    table.add_row("export", *_cells(result.export))
    if result.generate:
        table.add_row(f"{result.generate_tokens} tokens", *_cells(result.generate))
    console().print(table)
    limits = result.limits
    click.echo(f"limits: write {limits.write_gb_per_s:.2f} GB/s, sha256 {limits.sha256_gb_per_s:.2f} GB/s; the export "
               f"reached {result.limit_share:.0%} of them")


def _show_build(result: BuildBench) -> None:
    table = Table("experts, op", "seconds", "peak memory", "of these not file pages", "engine", "bound at run time",
                  title=f"{result.model}, {result.layers or 'all'} layers, fp16, {result.targets}: {result.flavour} "
                        f"{result.version}")
    for build in result.builds:
        table.add_row(build.variant, *_cells(build.run), _size(build.engine_bytes),
                      _size(build.bytes_bound_at_run_time))
    console().print(table)


def _cells(run: Child) -> tuple[str, str, str]:
    return f"{run.seconds:.1f}", _size(run.peak_rss_bytes), _size(run.peak_anonymous_bytes)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
