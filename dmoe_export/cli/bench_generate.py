"""`dmoe-export bench generate`: whole answers on the CPU, against an eager PyTorch baseline on the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from ..bench.generate import GenerateBench, run, settings
from ..bench.record import Started
from ..errors import CheckError
from .bench_common import bundle_options, integers, opened, outcome, words
from .progress import step_bar


@click.command()
@bundle_options
@click.option("--prompt-tokens", default="128,1024", show_default=True,
              help="Lengths of the random prompt, separated by commas.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--steps", type=click.IntRange(min=1), default=16, show_default=True,
              help="Denoise steps per block; random weights always take all of them.")
@click.option("--cache", default="auto", show_default=True, help="Caches to compare, separated by commas.")
@click.option("--coreset", default="default", show_default=True,
              help="Experts a block may use, separated by commas: numbers, default (the bundle's rule), "
              "all (token routing).")
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="Timed repetitions.")
@click.option("--peer/--no-peer", default=True, show_default=True, help="Compare with eager PyTorch.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the JSON here.")
@click.option("--plot", type=click.Path(path_type=Path), help="Write a PNG plot here.")
@click.option("--json", "as_json", is_flag=True, help="Print the JSON.")
def generate(prompt_tokens: str, cache: str, coreset: str, out: Path | None, plot: Path | None, as_json: bool,
             **options: Any) -> None:
    """Answers to a random prompt on the CPU: of BUNDLE, or of --geometry with generated weights.

    The baseline must give the same tokens, else the exit code is 1.
    """
    chosen = settings(integers("--prompt-tokens", prompt_tokens), words(cache), words(coreset))
    with opened(options, as_json) as bundle, step_bar("generate", shown=not as_json) as report:
        started = Started("bench generate")
        result = run(bundle, chosen, **options, advance=report)

    def draw(path: Path) -> None:
        from ..bench.plots_generate import plot_generate

        plot_generate(result, path)

    outcome(started.document(result), out, as_json, lambda: _show(result), draw, plot)
    for r in result.results:
        if r.same_tokens is False:
            raise CheckError(f"The baseline's answer differs from ours at place {r.first_difference} "
                             f"({r.prompt_tokens} prompt tokens, cache {r.cache}, coreset {r.coreset}); near-ties can "
                             "do that, so try another --seed before you suspect the model.")


def _show(result: GenerateBench) -> None:
    console = Console()
    console = console if console.is_terminal else Console(width=140)
    limits = result.limits
    console.print(f"{result.model}, {result.layers} layers, {result.precision}, {result.routing}: "
                  f"{result.max_new_tokens} new tokens in blocks of {result.block_length}, {result.steps} steps each, "
                  f"{limits.threads} threads, {result.rounds} rounds\nlimits: read {limits.read_gb_per_s:.1f} GB/s, "
                  f"copy {limits.copy_gb_per_s:.1f} GB/s, product {limits.gflop_per_s:.0f} GFLOP/s")
    table = Table("prompt", "cache", "coreset", "experts", "forwards", "tokens/s", "ms/step", "outside",
                  "peer tok/s", "peer ms/step", "ratio", "of steps", "same",
                  title="median (quartiles); ratio = peer's time / ours")
    for r in result.results:
        theirs = ["–"] * 5
        if r.peer:
            theirs = [f"{r.peer.tokens_per_second.median:.2f}", r.peer.denoise_milliseconds.shown(), f"{r.ratio:.2f}×",
                      f"{r.denoise_ratio:.2f}×", "yes" if r.same_tokens else "NO"]
        table.add_row(str(r.prompt_tokens), r.cache, r.coreset, f"{r.unique_experts:.1f}", str(r.forwards),
                      f"{r.ours.tokens_per_second.median:.2f}", r.ours.denoise_milliseconds.shown(),
                      f"{r.host_share.median:.2%}", *theirs)
    console.print(table)
