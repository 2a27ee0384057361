"""`python -m fuzz`: spread cases over all targets, show the table of outcomes, keep every defect with its command."""

from __future__ import annotations

import json
import multiprocessing
import queue
import shlex
import shutil
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import onnx_ir
import onnxruntime
import onnxscript
import tokenizers
import torch.onnx
from rich.console import Console
from rich.table import Table

import dmoe_export

from .case import ROOT, Base, pristine
from .child import Outcome, Runner
from .targets import TARGETS
from .targets.command_line import SHARES, parameters
from .verdict import DEFECTS, FINE, Verdict, judge, kind_of

IMPORTED = (onnx_ir, onnxruntime, onnxscript, tokenizers, torch.onnx)  # once, for all cases
for _verb in SHARES:
    parameters(_verb)
dmoe_export.export_checkpoint  # noqa: B018  and what it imports when it is asked for


def plan(cases: int, only: list[str]) -> list[tuple[str, int]]:
    """Targets and numbers of the cases, in shares and in turns: any beginning is spread over all targets."""
    shares = {name: share for name, (_, share) in TARGETS.items() if not only or name in only}
    total, made = sum(shares.values()), Counter[str]()
    chosen: list[tuple[str, int]] = []
    for count in range(1, cases + 1):
        name = max(shares, key=lambda one: shares[one] * count / total - made[one])
        chosen.append((name, made[name]))
        made[name] += 1
    return chosen


def _work(folder: Path, base: Base, seed: int, real: int, todo: Any, done: Any) -> None:
    runner = Runner(folder, base, seed, real)
    while True:
        try:
            target, number = todo.get(timeout=1)
        except queue.Empty:
            return
        outcome = runner.run(target, number)
        verdict = judge(outcome)
        if verdict.name == "hang":  # a busy machine is no defect
            outcome = runner.run(target, number)
            verdict = judge(outcome)
        if verdict.defect:
            _keep(folder, outcome, verdict, seed)
        done.put((outcome, verdict))


def _keep(folder: Path, outcome: Outcome, verdict: Verdict, seed: int) -> None:
    """A defect's files and command, to be tried again by hand."""
    place = folder.parent / "defects" / f"{outcome.target.replace(' ', '-').replace(',', '')}-{outcome.number}"
    shutil.rmtree(place, ignore_errors=True)
    place.parent.mkdir(parents=True, exist_ok=True)  # so that it is a rename: a pipe cannot be copied
    shutil.move(folder / "case", place)
    lines = [
        f"# {verdict.name}: {verdict.why}",
        f"# {outcome.done}",
        f"# again: python -m fuzz --seed {seed} --case '{outcome.target}' {outcome.number}",
    ]
    lines += [
        shlex.join(["dmoe-export", *command]).replace(str(folder / "case"), str(place)) for command in outcome.commands
    ]
    (place / "command.sh").write_text(
        "\n".join(line.replace("\n", "\n# ") if line.startswith("#") else line for line in lines) + "\n",
        errors="replace",
    )


def _run(
    work: Path, base: Base, seed: int, real: int, cases: list[tuple[str, int]], workers: int, seconds: float | None
) -> list[tuple[Outcome, Verdict]]:
    context = multiprocessing.get_context("fork")
    todo, done = context.Queue(), context.Queue()
    for case in cases:
        todo.put(case)
    crew = [
        context.Process(target=_work, args=(work / f"worker-{i}", base, seed, real, todo, done)) for i in range(workers)
    ]
    for one in crew:
        one.start()
    results: list[tuple[Outcome, Verdict]] = []  # in the order in which they came
    start = time.monotonic()
    while len(results) < len(cases) and not (seconds and time.monotonic() - start > seconds):
        try:
            results.append(done.get(timeout=1))
        except queue.Empty:
            if not any(one.is_alive() for one in crew):
                raise SystemExit("The workers ended before the cases did.") from None
            continue
        verdict = results[-1][1]
        if verdict.defect:
            click.echo(f"{results[-1][0].target} {results[-1][0].number}: {verdict.name}: {verdict.why[:150]!a}")
    for one in crew:
        one.terminate()
    return results


def table_of(results: list[tuple[Outcome, Verdict]]) -> Table:
    """Outcomes per target; only those that there were."""
    counts: dict[str, Counter[str]] = {}
    for outcome, verdict in results:
        counts.setdefault(outcome.target, Counter())[verdict.name] += 1
    names = [
        name for name in (*FINE, *DEFECTS) if any(c[name] for c in counts.values()) or name in FINE[:4] + DEFECTS[:4]
    ]
    table = Table("target", "cases", *names, title="Outcomes")
    for target in [name for name in TARGETS if name in counts]:
        table.add_row(target, *map(str, [sum(counts[target].values()), *(counts[target][name] for name in names)]))
    all_counts = sum(counts.values(), Counter[str]())
    table.add_section()
    table.add_row("all", *map(str, [sum(all_counts.values()), *(all_counts[name] for name in names)]))
    return table


@click.command()
@click.option("--cases", default=5500, show_default=True, help="So many, spread over the targets.")
@click.option("--seed", default=0, show_default=True, help="The same seed gives the same cases.")
@click.option("--seconds", type=float, help="Stop after so long, whatever is left.")
@click.option("--only", multiple=True, type=click.Choice(list(TARGETS)), help="This target; may be given again.")
@click.option("--case", "one", type=(click.Choice(list(TARGETS)), int), help="One case, and all that it printed.")
@click.option("--workers", default=2, show_default=True)
@click.option(
    "--real-traces", default=50, show_default=True, help="Trace one of so many accepted checkpoints; 0: none."
)
@click.option("--json", "report", type=click.Path(path_type=Path), help="Write all outcomes here.")
@click.option(
    "--base", "given", type=click.Path(path_type=Path), help="A folder with pristine files [made from these sources]."
)
@click.option(
    "--out", default=ROOT / "out" / "fuzz", type=click.Path(path_type=Path), help="Folder for files of cases."
)
def fuzz(
    cases: int,
    seed: int,
    seconds: float | None,
    only: tuple[str, ...],
    one: tuple[str, int] | None,
    workers: int,
    real_traces: int,
    report: Path | None,
    given: Path | None,
    out: Path,
) -> None:
    """Try hostile inputs; exit code 1 where one is neither answered rightly nor refused in one sentence."""
    out.mkdir(parents=True, exist_ok=True)
    work = out.absolute()
    base, start = Base(given.absolute()) if given else pristine(work), time.monotonic()
    if one:
        outcome = Runner(work / "one", base, seed, real_traces).run(*one)
        click.echo(json.dumps(asdict(outcome) | asdict(judge(outcome)), indent=1))
        sys.exit(judge(outcome).defect)
    shutil.rmtree(work / "defects", ignore_errors=True)
    results = _run(work, base, seed, real_traces, plan(cases, list(only)), workers, seconds)
    wrong = [(outcome, verdict) for outcome, verdict in results if verdict.defect]
    Console(width=160).print(table_of(results))
    kinds = Counter(kind_of(verdict) for _, verdict in wrong)
    for kind, count in kinds.most_common():
        click.echo(f"{count:5} × {kind!a}")
    click.echo(
        f"{len(results)} cases in {time.monotonic() - start:.0f} s, {len(wrong)} defects of {len(kinds)} kinds"
        + (f"; see {work / 'defects'}" if wrong else "")
    )
    if report:
        report.write_text(json.dumps([asdict(outcome) | asdict(verdict) for outcome, verdict in results], indent=1))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    fuzz()
