"""`dmoe-export bench serve`: a server under load, against closed batches and against no server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.table import Table

from ..bench.record import Started
from ..bench.serve import ServeBench, Way, run
from ..errors import CheckError, MissingRequirementError, RequestError
from ..extras import pip_install
from ..runtime.cpu.session import MOST_THREADS
from ..words import count
from .bench_common import bundle_options, computed_by, integers, opened, outcome
from .help import SETTINGS, Verb, option
from .options import CPU_PRODUCTS, JSON, OUT, PLOT
from .output import console
from .progress import step_bar


@click.command(cls=Verb, context_settings=SETTINGS, examples=(
    "dmoe-export bench serve sample.bundle --requests 8 --clients 1,4 --rounds 1 --new-tokens 8-64",
    "dmoe-export bench serve --geometry tiny --work WORK --out serve.json --plot serve.png"))
@bundle_options
@option("--clients", default="1,2,4,8", metavar="N,…", group="load",
        help="Clients at a time, separated by commas; each has one request at a time")
@option("--requests", type=click.IntRange(1, 10_000), default=24, group="load",
        help="Requests until a measurement ends; clients begin again until then")
@option("--prompt-tokens", default="16-128", metavar="N-N", group="load",
        help="Shortest and longest random prompt")
@option("--new-tokens", default="32-128", metavar="N-N", group="load", help="Shortest and longest answer")
@option("--steps", default="2-6", metavar="N-N", group="load",
        help="Fewest and most forward passes of a block, drawn for each request; random weights take all of them")
@option("--rounds", type=click.IntRange(1, 1000), default=2, group="measuring",
        help="Timed repetitions; more is slower and steadier")
@option("--threads", type=click.IntRange(1, MOST_THREADS), default=2, group="bundle and machine",
        values="between 1 and 8 per CPU", help="Threads per operator, of the server and of what it is compared with")
@CPU_PRODUCTS
@OUT
@PLOT
@JSON
def serve(clients: str, prompt_tokens: str, new_tokens: str, steps: str, out: Path | None, plot: Path | None,
          as_json: bool, **options: Any) -> None:
    """Clients of a server process on the CPU: BUNDLE's, or of --geometry with generated weights.

    Answers must be the same in every way, else the exit code is 1; not with --cpu-products fast or without our
    kernels, whose rounding may depend on the batch.
    """
    try:
        import uvicorn  # noqa: F401  # the server is another process; this one can tell what to install
    except ModuleNotFoundError as error:
        raise MissingRequirementError(f"Serving needs {error.name}; run: {pip_install('serve')}.") from None
    at = integers("--clients", clients)
    if min(at) < 1 or max(at) > 1000:
        raise RequestError(f"--clients is {clients!r}; each must be between 1 and 1000.")
    prompts, answers = _range("--prompt-tokens", prompt_tokens), _range("--new-tokens", new_tokens)
    forwards = _range("--steps", steps)
    with opened(options, as_json) as bundle, step_bar("serve", shown=not as_json) as report:
        started = Started("bench serve")
        result = run(bundle, clients=at, prompt_tokens=prompts, new_tokens=answers, steps=forwards, **options,
                     advance=report)

    def draw(path: Path) -> None:
        from ..bench.plots_serve import plot_serve

        plot_serve(result, path)

    outcome(started.document(result), out, as_json, lambda: _show(result), draw, plot)
    if result.differing and result.cpu_ops and options["cpu_products"] == "exact":
        raise CheckError(f"{count(result.differing, 'answer')} had other tokens than the same request alone: rows "
                         "depend on what shares their batch, which they must not.")


def _range(name: str, text: str) -> tuple[int, int]:
    """Two numbers, or one for both."""
    parts = text.split("-")
    if len(parts) <= 2 and all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts):
        low, high = int(parts[0]), int(parts[-1])
        if 1 <= low <= high:
            return low, high
    raise RequestError(f"{name} is {text!r}; give the least and the most, such as 16-256.")


def _show(result: ServeBench) -> None:
    out = console(140)
    out.print(f"{result.model}, {count(result.layers, 'layer')}, {result.precision}, {result.routing}: "
              f"{count(result.requests, 'request')} of {_words(result.prompt_tokens)} prompt and "
              f"{_words(result.new_tokens)} new tokens, {_words(result.steps)} steps a block, "
              f"{count(result.threads, 'thread')}, {count(result.rounds, 'round')}, products by "
              f"{computed_by(result.cpu_ops)}, {result.products}; {count(result.differing, 'answer')} differ")
    table = Table("clients", "who", "tokens/s", "a step", "rows", "first block, s", "answer, s", "to closed", "a step",
                  "to one at a time", title="tokens/s: median (quartiles) of rounds; a step: tokens of all rows; "
                  "seconds: median, 95 of 100; ratios: median, least")
    lone = result.overhead
    table.add_row("1", "Generator", *_cells(lone.alone), "", "", "")
    table.add_row("", "server", *_cells(lone.served), "", "", "")
    for at in result.results:
        table.add_row(str(at.clients), "joining", *_cells(at.joining), *(
            f"{gain.median:.2f}×, {gain.least:.2f}×" for gain in (at.over_closed, at.steps_over_closed, at.over_one)))
        table.add_row("", "closed", *_cells(at.closed), "", "", "")
    out.print(table)
    out.print(f"The server takes {lone.share:+.1%} of a request's time at one client ({lone.milliseconds:+.1f} ms; "
              f"medians of the same request in turns), {lone.share_of_all:+.1%} of all.")


def _words(lengths: tuple[int, int]) -> str:
    return f"{lengths[0]} to {lengths[1]}"


def _cells(way: Way) -> tuple[str, ...]:
    rate = way.tokens_per_second
    first = f"{way.first_block.half:.2f}, {way.first_block.most:.2f}"
    return (rate.shown(digits=1 if rate.median < 1000 else 0),
            f"{way.tokens_per_step:.1f}", f"{way.rows_per_step:.1f}", first,
            f"{way.answer.half:.2f}, {way.answer.most:.2f}")
