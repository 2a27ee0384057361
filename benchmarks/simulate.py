"""Replicas × rows × load → tokens per second, waiting, use and price, without running them (docs/simulation.md).

    python benchmarks/simulate.py measure BUNDLE --out steps.json
    python benchmarks/simulate.py run --steps-of steps.json --replicas 1,2,4 --rates 0.5,1,2
    python benchmarks/simulate.py check --work WORK --out benchmarks/results/simulation_<device>_<date>.json
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import click
from measuring import now
from rich.console import Console
from rich.table import Table
from simulation import ASSUMPTIONS
from simulation.check import Check, check
from simulation.figures import Case, Figures, simulate
from simulation.fleet import ROUTES
from simulation.measure import Measured
from simulation.shown import cell, markdown, plot
from simulation.steps import StepTimes, predicted

from dmoe_export import Generator
from dmoe_export.bench.record import Started
from dmoe_export.bench.serve_load import load
from dmoe_export.errors import DmoeError, RequestError

PREDICTIONS = Path(__file__).parent / "predictions.json"
_LOAD = (click.option("--prompt-tokens", default="16-128", show_default=True, help="shortest and longest prompt"),
         click.option("--new-tokens", default="32-128", show_default=True, help="shortest and longest answer"),
         click.option("--steps", default="2-6", show_default=True, help="fewest and most forward passes of a block"),
         click.option("--seed", default=0, show_default=True))
_OUT = click.option("--out", type=click.Path(path_type=Path), help="write the result as JSON there")


def load_options(command: Any) -> Any:
    """Lengths of prompts and answers, steps of a block, seed."""
    for one in reversed(_LOAD):
        command = one(command)
    return command


@click.group()
def main() -> None:
    """See docs/simulation.md."""


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--rows", default="1,2,4,8", show_default=True, help="rows of the batch at which steps are measured")
@click.option("--requests", default=24, show_default=True, help="that join at each number of rows")
@click.option("--backend", default="auto", show_default=True)
@click.option("--threads", type=int)
@load_options
@_OUT
def measure(bundle: Path, rows: str, requests: int, backend: Any, threads: int | None, prompt_tokens: str,
            new_tokens: str, steps: str, seed: int, out: Path | None) -> None:
    """Measure steps of BUNDLE here, without a server, and fit their times."""
    started, measured, at = _started(), Measured(), _whole(rows)
    with Generator.open(bundle, backend=backend, threads=threads, verify="sizes") as generator:
        asked = load(generator.bundle, requests, _range(prompt_tokens), _range(new_tokens), _range(steps), seed)
        for count in at:
            measured.add(generator, asked, count, max(at))
        found = measured.fitted(generator, f"{generator.bundle.folder.name}, {generator.backend.name}")
    click.echo(f"{found.what}: {found.steps} steps, median error {found.residual_median:.1%}, "
               f"{found.explained:.1%} of the variance explained")
    _write(started.document(found), out)


@main.command()
@click.option("--steps-of", type=click.Path(path_type=Path, exists=True), help="what `measure` wrote")
@click.option("--gpu", help="instead of --steps-of: predictions of predictions.json, such as H100")
@click.option("--backend", default="onnxruntime-cuda ops, CUDA graphs", show_default=True, help="of --gpu")
@click.option("--tflops", type=float, help="of --gpu: operations that prefills reach, in 10¹² a second; assumed")
@click.option("--replicas", default="1,2,4", show_default=True)
@click.option("--slots", default=8, show_default=True, help="rows of a replica's batch")
@click.option("--rates", help="requests a second at random, of all replicas")
@click.option("--clients", help="instead of --rates: clients with one request at a time")
@click.option("--route", type=click.Choice(ROUTES), default="least", show_default=True)
@click.option("--most-ongoing", type=int, help="requests of a replica; more are refused")
@click.option("--requests", default=1000, show_default=True, help="of each case")
@click.option("--price-per-hour", type=float, help="of a replica")
@click.option("--plot", "picture", type=click.Path(path_type=Path), help="draw the cases that keep up; with --rates")
@click.option("--markdown", "as_page", is_flag=True, help="print the tables of docs/simulation.md")
@load_options
@_OUT
def run(steps_of: Path | None, gpu: str | None, backend: str, tflops: float | None, replicas: str, slots: int,
        rates: str | None, clients: str | None, route: Any, most_ongoing: int | None, requests: int,
        price_per_hour: float | None, picture: Path | None, as_page: bool, prompt_tokens: str, new_tokens: str,
        steps: str, seed: int, out: Path | None) -> None:
    """Simulate every number of replicas under every load."""
    if bool(steps_of) == bool(gpu) or bool(rates) == bool(clients):
        raise click.UsageError("Give one of --steps-of and --gpu, and one of --rates and --clients.")
    if gpu and not tflops:
        raise click.UsageError("Give --tflops with --gpu: what prefills reach is predicted nowhere, so say it.")
    if steps_of:
        known = json.loads(steps_of.read_text())
        times = [StepTimes.model_validate({name: known[name] for name in StepTimes.model_fields})]
    else:
        predictions = json.loads(PREDICTIONS.read_text())
        times = [predicted(predictions, str(gpu), backend, bound, float(tflops or 0)) for bound in ("low", "high")]
    shape = {"slots": slots, "route": route, "most_ongoing": most_ongoing, "requests": requests, "seed": seed,
             "price_per_hour": price_per_hour, "prompt_tokens": _range(prompt_tokens),
             "new_tokens": _range(new_tokens), "steps": _range(steps)}
    found = []
    for count in _whole(replicas):
        for load_of in _numbers(rates) if rates else _whole(clients or ""):
            case = Case(replicas=count, **{"rate" if rates else "clients": load_of}, **shape)
            found.append((case, [simulate(one, case) for one in times]))
    _show(times, found)
    if as_page:
        for of, digits in ((lambda f: f.first_block.most, 2), (lambda f: f.answer.half, 1),
                           (lambda f: 100 * f.utilisation, 0), (lambda f: f.replica_hours_per_million_tokens, 2)):
            click.echo("\n" + markdown(found, of, digits))
    if picture:
        plot(found, _title(times), picture)
    cases = [{"case": case.model_dump(mode="json"), "figures": [one.model_dump(mode="json") for one in figures]}
             for case, figures in found]
    _write({"date": now(), "command": _command(), "assumptions": ASSUMPTIONS,
            "steps": [one.model_dump(mode="json") for one in times], "cases": cases}, out)


@main.command("check")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="folder that keeps the bundle")
@click.option("--rounds", default=4, show_default=True)
@click.option("--minutes", default=6.0, show_default=True, help="no round begins that would end later")
@click.option("--requests", default=16, show_default=True, help="of each load")
@load_options
@_OUT
def checked(work: Path, rounds: int, minutes: float, requests: int, prompt_tokens: str, new_tokens: str, steps: str,
            seed: int, out: Path | None) -> None:
    """Simulated against real: one server and two on this machine, each with one thread."""
    started = _started()
    result = check(work, rounds, requests, _range(prompt_tokens), _range(new_tokens), _range(steps), seed,
                   minutes, lambda what: click.echo(what, err=True))
    _show_check(result)
    _write(started.document(result), out)


def _started() -> Started:
    started = Started("simulate")
    started.head = started.head.model_copy(update={"command": _command()})
    return started


def _command() -> str:
    """As typed, without folders: results are published."""
    words = [word.rstrip("/").rpartition("/")[2] for word in sys.argv[1:]]
    return " ".join(["python benchmarks/simulate.py", *map(shlex.quote, words)])


def _numbers(text: str) -> list[float]:
    """Above 0, separated by commas."""
    try:
        found = [float(word) for word in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < one < float("inf") for one in found):
        raise RequestError(f"{text!r} is no list of numbers above 0; give them separated by commas, such as 1,2,4.")
    return found


def _whole(text: str) -> list[int]:
    """The same as integers."""
    found = _numbers(text)
    if not all(one.is_integer() for one in found):
        raise RequestError(f"{text!r} is no list of integers; give them separated by commas, such as 1,2,4.")
    return [int(one) for one in found]


def _range(text: str) -> tuple[int, int]:
    """Two integers above 0, or one for both."""
    low, dash, high = text.partition("-")
    high = high if dash else low
    if not all(word.isascii() and word.isdigit() for word in (low, high)) or not 0 < int(low) <= int(high):
        raise RequestError(f"{text!r} is no range of integers above 0; give the least and the most, such as 16-128.")
    return int(low), int(high)


def _write(document: dict[str, Any], out: Path | None) -> None:
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(document, indent=1) + "\n")


def _title(times: list[StepTimes]) -> str:
    """What the steps are of; of two bounds once."""
    return times[0].what.replace(", low prediction", ": predicted, low … high; never measured")


def _show(times: list[StepTimes], found: list[tuple[Case, list[Figures]]]) -> None:
    """A row for each case; of predictions low … high."""
    table = Table("replicas", "load", "tokens/s", "first block p50, s", "p95", "answer p50, s", "p95", "in use", "rows",
                  "replica hours per 1M tokens", "cost per 1M tokens",
                  title=f"{_title(times)}; *: does not keep up")
    for case, figures in found:
        def told(of: Any, digits: int, figures: list[Figures] = figures) -> str:
            return cell(figures, of, digits)

        table.add_row(
            str(case.replicas), case.load,
            told(lambda f: f.tokens_per_second, 0) + ("" if all(f.kept_up for f in figures) else " *"),
            told(lambda f: f.first_block.half, 2), told(lambda f: f.first_block.most, 2),
            told(lambda f: f.answer.half, 2), told(lambda f: f.answer.most, 2), told(lambda f: f.utilisation, 2),
            told(lambda f: f.rows_per_step, 1), told(lambda f: f.replica_hours_per_million_tokens, 3),
            told(lambda f: f.cost_per_million_tokens, 3) if case.price_per_hour else "–")
    Console(width=170).print(table)


def _show_check(result: Check) -> None:
    names = list(result.results[0].ratio)
    table = Table("replicas", "load", "steps", *names, title=f"simulated / measured, median of "
                  f"{result.rounds} rounds (least … most); {result.model}")
    for one in result.results:
        cells = [f"{one.ratio[name]:.2f} ({min(one.ratios[name]):.2f} … {max(one.ratios[name]):.2f})"
                 if name in one.ratio else "–" for name in names]
        table.add_row(str(one.replicas), f"{one.clients} clients" if one.clients else f"{one.rate:.2f}/s", one.steps,
                      *cells)
    console = Console(width=190)
    console.print(table)
    slower = ", ".join(f"{one:.2f}" for one in result.slower_beside)
    console.print(f"Steps beside a busy server take {slower} times as long.")


if __name__ == "__main__":
    try:
        main()
    except DmoeError as error:
        click.echo(f"simulate: {error}", err=True)
        sys.exit(error.exit_code)
