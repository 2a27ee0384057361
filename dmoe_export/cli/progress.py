"""Progress bars, on standard error, for work that takes longer than a moment."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

stderr = Console(stderr=True)


@contextmanager
def byte_bar(label: str, total: int, shown: bool = True) -> Iterator[Callable[[str, int, int], None]]:
    """A bar over bytes; yields a function (phase, done, of)."""
    with Progress(TextColumn("{task.description:>8}"), BarColumn(), DownloadColumn(), TimeRemainingColumn(),
                  console=stderr, disable=not (shown and stderr.is_terminal), transient=True) as progress:
        task = progress.add_task(label, total=total or None)

        def update(phase: str, done: int, of: int) -> None:
            progress.update(task, description=phase, completed=done, total=of or None)

        yield update


@contextmanager
def step_bar(label: str, shown: bool = True) -> Iterator[Callable[[str, int, int], None]]:
    """A bar over the steps of named phases; yields a function (phase, done, of)."""
    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                  console=stderr, disable=not (shown and stderr.is_terminal), transient=True) as progress:
        task = progress.add_task(label, total=None)

        def update(phase: str, done: int, of: int) -> None:
            progress.update(task, description=f"{label}: {phase}", completed=done, total=of or None)

        yield update
