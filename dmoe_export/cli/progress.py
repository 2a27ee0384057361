"""Signs of life on standard error while work takes its time: a bar in a terminal, else a line now and then."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ..words import size

Report = Callable[[str, int, int], None]
"""Told the phase, how much of it is done, and of how much (0: nobody knows)."""

stderr = Console(stderr=True)
EVERY = 30.0  # seconds from line to line where standard error is no terminal: a log is read later


def byte_bar(label: str, total: int, shown: bool = True) -> AbstractContextManager[Report]:
    """Progress over bytes; yields a function (phase, done, of)."""
    columns = DownloadColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    return _progress("", label, total, columns, lambda done, of: f"{size(done)} of {size(of)}", shown)


def step_bar(label: str, shown: bool = True) -> AbstractContextManager[Report]:
    """Progress over the steps of named phases; yields a function (phase, done, of)."""
    columns = MofNCompleteColumn(), TimeElapsedColumn()
    return _progress(f"{label}: ", label, 0, columns, lambda done, of: f"{done} of {of}", shown)


@contextmanager
def _progress(prefix: str, label: str, total: int, columns: tuple[ProgressColumn, ...],
              words: Callable[[int, int], str], shown: bool) -> Iterator[Report]:
    if not shown:
        yield lambda phase, done, of: None
    elif not stderr.is_terminal:
        with _lines(prefix, label, words) as report:
            yield report
    else:
        with Progress(SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), *columns, console=stderr,
                      transient=True) as progress:
            task = progress.add_task(label, total=total or None)
            yield lambda phase, done, of: progress.update(task, description=prefix + phase, completed=done,
                                                          total=of or None)


@contextmanager
def _lines(prefix: str, label: str, words: Callable[[int, int], str]) -> Iterator[Report]:
    """A line every `EVERY` seconds: what is being done, how far it is, how long it has taken."""
    start, ended, now = time.monotonic(), threading.Event(), (label, 0, 0)

    def report(phase: str, done: int, of: int) -> None:
        nonlocal now
        now = (prefix + phase, done, of)

    def speak() -> None:
        while not ended.wait(EVERY):
            phase, done, of = now
            far = f", {words(done, of)}" if of else ""
            click.echo(f"dmoe-export: {phase}{far}, {time.monotonic() - start:.0f} s so far", err=True)

    speaker = threading.Thread(target=speak, daemon=True)
    speaker.start()
    try:
        yield report
    finally:
        ended.set()
        speaker.join()
