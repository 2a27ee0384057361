"""`dmoe-export bench step`: one denoise step, by part and op, against its matrix products and the machine's limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.table import Table

from ..bench.parts import PARTS
from ..bench.record import Started
from ..bench.step import StepBench, StepOptions, run
from ..runtime.cpu.session import MOST_THREADS
from ..words import count
from .bench_common import bundle_options, computed_by, integers, opened, outcome, words
from .help import SETTINGS, Verb, option
from .options import CPU_PRODUCTS, JSON, OUT, PLOT
from .output import console
from .progress import step_bar


@click.command(cls=Verb, context_settings=SETTINGS, examples=(
    "dmoe-export bench step sample.bundle --cached 0,256 --repeats 3",
    "dmoe-export bench step sample.bundle --cached 0 --active-experts 8,natural --repeats 3 --ops 5"))
@bundle_options
@option("--active-experts", default="natural", metavar="N,…", group="compared",
        help="Active experts of every MoE layer, separated by commas; natural is the router's own choice")
@option("--cached", default="0,256,1024,4096", metavar="N,…", group="compared",
        help="Cached tokens, separated by commas")
@option("--tokens", type=click.IntRange(min=1), default=32, group="the step", help="New tokens")
@option("--rows", type=click.IntRange(min=1), group="the step", shown="all",
        help="Tokens whose logits are asked for: places not filled yet")
@option("--phase", type=click.Choice(["denoise", "commit"]), default="denoise", group="the step",
        help="denoise fills gaps; commit keeps a finished block for later ones")
@option("--repeats", type=click.IntRange(1, 1000), default=9, group="measuring",
        help="Timed repetitions; more is slower and steadier")
@option("--warmup", type=click.IntRange(1, 1000), default=2, group="measuring", help="Repetitions that are not timed")
@option("--cpu-ops", type=click.Choice(["auto", "on", "off"]), default="auto", group="bundle and machine",
        help="Whether our kernels compute experts, linear layers and attention; auto: where they are installed")
@option("--threads", type=click.IntRange(1, MOST_THREADS), default=2, group="bundle and machine",
        values="between 1 and 8 per CPU", help="Threads per operator")
@CPU_PRODUCTS
@option("--ops", type=click.IntRange(min=0), default=0, group="output", help="Show so many of the slowest ops")
@OUT
@PLOT
@JSON
def step(active_experts: str, cached: str, ops: int, out: Path | None, plot: Path | None, as_json: bool,
         **options: Any) -> None:
    """One forward pass on the CPU: of BUNDLE, or of --geometry with generated weights.

    Every setting of --active-experts and --cached is timed in turns with the step's matrix products, each by itself.
    """
    with opened(options, as_json) as bundle, step_bar("step", shown=not as_json) as report:
        started = Started("bench step")
        active = [None if text == "natural" else integers("--active-experts", text)[0]
                  for text in words(active_experts)]
        result = run(bundle, active, integers("--cached", cached), StepOptions(**options), report)

    def draw(path: Path) -> None:
        from ..bench.plots_step import plot_step

        plot_step(result, path)

    outcome(started.document(result), out, as_json, lambda: _show(result, ops), draw, plot)


def _show(result: StepBench, ops: int) -> None:
    out = console(140)
    limits = result.limits
    out.print(f"{result.model}, {count(result.layers, 'layer')}, {result.precision}, {result.routing}: "
              f"{count(result.tokens, 'token')}, {count(result.rows, 'vocabulary row')}, "
              f"{count(limits.threads, 'thread')}, products by "
              f"{computed_by(result.cpu_ops)}, {result.products}\nlimits: read "
              f"{limits.read_gb_per_s:.1f} GB/s, copy {limits.copy_gb_per_s:.1f} GB/s, product "
              f"{limits.gflop_per_s:.0f} GFLOP/s")
    table = Table("experts", "cached", "step ms", "products ms", "ratio", "of least", "limit", "GB/s", "GFLOP/s",
                  "outside", title="median (quartiles); ratio = step / products; limit = share of the machine's limit")
    parts = Table("experts", "cached", *PARTS, title="milliseconds in ONNX Runtime's profile (products alone)")
    for r in result.results:
        names = (_experts(r.unique_experts), str(r.cached))
        table.add_row(*names, r.seconds.shown(1e3), r.products_seconds.shown(1e3), f"{r.ratio:.2f}",
                      f"{r.ratio_of_least:.2f}", f"{r.limit_share:.0%}", f"{r.gb_per_s:.1f}", f"{r.gflop_per_s:.0f}",
                      f"{r.outside_share:.2%}")
        parts.add_row(*names, *(f"{r.profile_milliseconds[part]:.1f}" + (
            f" ({r.products_by_part[part]:.1f})" if part in r.products_by_part else "") for part in PARTS))
    out.print(table)
    out.print(parts)
    if ops:
        slowest = Table("experts", "cached", "part", "op", "nodes", "ms", title="slowest ops")
        for r in result.results:
            for op in r.profile_ops[:ops]:
                slowest.add_row(_experts(r.unique_experts), str(r.cached), op.part, op.op, str(op.nodes),
                                f"{op.milliseconds:.2f}")
        out.print(slowest)


def _experts(unique: list[int]) -> str:
    return "–" if not unique else str(unique[0]) if len(set(unique)) == 1 else f"{min(unique)}–{max(unique)}"
