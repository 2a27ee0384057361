"""`dmoe-export bench residency`: what an expert budget costs, and what refreshing residents saves."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from .. import __version__
from ..bench.residency import ResidencyBench, run, settings
from ..bundle.hub import resolve_bundle
from ..bundle.reader import open_bundle
from ..errors import RequestError
from ..guards.numerals import integer
from ..runtime.cpu.resident import check_experts
from ..words import count, size
from .bench_common import outcome
from .help import SETTINGS, Verb, option
from .options import JSON, OUT, PLOT, THREADS, VERIFY, seal_options
from .output import console
from .progress import step_bar


@click.command(cls=Verb, context_settings=SETTINGS, examples=(
    "dmoe-export bench residency sample.bundle --budget 50% --interval auto --rounds 1 --turns 0",
    "dmoe-export bench residency sample.bundle --budget 25% --routing top_p:0.4 --rounds 1 --plot residency.png"))
@click.argument("bundle", type=click.Path(path_type=Path))
@option("--budget", "budgets", default="50%,25%,10%", metavar="SIZE,…", group="compared",
        help="Memory for experts such as 8G or 25%, separated by commas; off is without a budget")
@option("--interval", "intervals", default="auto,1,never", metavar="N,…", group="compared",
        help="Denoise steps between changes of the experts kept: auto, never or numbers, separated by commas")
@option("--routing", "routings", default="token,top_p", metavar="NAME,…", group="compared",
        help="token, top_p (the bundle's p) or top_p:0.4, separated by commas; needs a top_p bundle")
@option("--prompt-ids", default="5,6,7,8", metavar="IDS", group="decoding", help="Token ids of the prompt")
@option("--max-new-tokens", type=click.IntRange(min=1), default=64, group="decoding", help="Tokens of an answer")
@option("--steps", type=click.IntRange(min=1), default=32, group="decoding",
        help="Most forward passes that fill one block")
@option("--rounds", type=click.IntRange(1, 1000), default=3, group="measuring",
        help="Timed repetitions; more is slower and steadier")
@option("--turns", type=click.IntRange(0, 1000), default=15, group="measuring",
        help="Steps timed with a budget of everything and without one, in turns")
@THREADS
@VERIFY
@seal_options
@option("--device", metavar="NAME", group="output", help="Name of the machine for the result")
@OUT
@PLOT
@JSON
def residency(bundle: Path, budgets: str, intervals: str, routings: str, prompt_ids: str, max_new_tokens: int,
              steps: int, rounds: int, turns: int, threads: int | None, verify: Any, device: str | None,
              out: Path | None, plot: Path | None, as_json: bool, **seal: Any) -> None:
    """Compare expert budgets of BUNDLE on the CPU: budget × interval × routing, and what a budget costs by itself."""
    opened = open_bundle(resolve_bundle(bundle), verify, **seal)
    moe = opened.manifest.model.moe
    if moe is None:
        raise RequestError(f"{bundle} is a dense model: it has no experts to keep.")
    check_experts(opened)
    try:
        ids = [integer(part) for part in prompt_ids.split(",")]
    except ValueError:
        raise RequestError(f"--prompt-ids {prompt_ids!r} is no list of integers such as 1,2,3.") from None
    lists = [[part.strip() for part in text.split(",")] for text in (budgets, intervals, routings)]
    chosen = settings(lists[0], lists[1], lists[2], moe.num_experts)
    done = 0
    with step_bar("residency", shown=not as_json) as report:

        def advance(what: str) -> None:
            nonlocal done
            done += 1
            report(what, done, len(chosen) * rounds)

        result = run(opened, ids, chosen, rounds, max_new_tokens=max_new_tokens, steps=steps, turns=turns,
                     threads=threads, advance=advance)
    document = {"what": "bench residency", "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "version": __version__, "bundle": bundle.name, "device": device or platform.machine(),
                "cores": os.cpu_count(), "load_average": os.getloadavg(), **result.model_dump()}

    def draw(path: Path) -> None:
        from ..bench.plots import plot_residency

        plot_residency(result, path)

    outcome(document, out, as_json, lambda: _show(result), draw, plot)


def _show(result: ResidencyBench) -> None:
    table = Table("routing", "budget", "interval", "tokens/s", "hit rate", "brought GB", "missed GB", "dropped GB",
                  "read GB", "peak GB", "same tokens", title=f"{size(result.expert_bytes)} of experts, "
                  f"{count(result.max_new_tokens, 'new token')}, {count(result.rounds, 'round')}")
    for r in result.results:
        interval = f"{r.interval} ({r.last_interval or 'never'})" if r.interval == "auto" else r.interval
        table.add_row(r.routing, r.budget, interval, f"{r.tokens_per_second:.2f}", _or_dash(r.hit_rate),
                      _or_dash(r.brought_bytes, 1e-9), _or_dash(r.missed_bytes, 1e-9), _or_dash(r.dropped_bytes, 1e-9),
                      f"{r.read_bytes / 1e9:.2f}", f"{r.peak_expert_bytes / 1e9:.2f}", "yes" if r.same_tokens else "NO")
    for column in table.columns:
        column.overflow = "fold"
    console(140).print(table)
    if result.price:
        prices = Table("routing", "experts a layer", "beside Python", "without ms", "budget of all ms", "ratio",
                       title="The same step without a budget and under one that holds everything, in turns")
        for p in result.price:
            prices.add_row(p.routing, f"{p.unique_experts:.1f}", "yes" if p.beside_python else "no",
                           p.without_seconds.shown(1e3), p.under_seconds.shown(1e3), f"{p.ratio:.3f}")
        console(140).print(prices)


def _or_dash(value: float | None, scale: float = 1.0) -> str:
    return "–" if value is None else f"{value * scale:.2f}"
