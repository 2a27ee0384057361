"""Standard output: how wide it is, and what happens when nobody reads it any more."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import click

from ..words import visible

if TYPE_CHECKING:
    from rich.console import Console


def console(width: int = 120) -> Console:
    """Of a terminal its own width, else `width`: a file or a pipe has no reason to cut tables."""
    from rich.console import Console  # not for `--version`

    found = Console()
    return found if found.is_terminal else Console(width=width)


def say(sentence: str, err: bool = False) -> None:
    """One line for people, whatever names and texts of others it quotes."""
    click.echo(visible(sentence), err=err)


class _Said(logging.Handler):
    """Warnings of the package as sentences."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one."""
        say(f"dmoe-export: warning: {record.getMessage()}", err=True)


@contextmanager
def warnings_said() -> Iterator[None]:
    """What the package logs is shown as a warning; without this, Python prints the bare words."""
    log, handler = logging.getLogger("dmoe_export"), _Said(logging.WARNING)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


@contextmanager
def reader_may_leave() -> Iterator[None]:
    """What is printed inside may be cut short by who reads it (`| head`): no error, and no reason for an exit code."""
    try:
        yield
    except BrokenPipeError:
        with suppress(OSError):  # of a standard output that is no file
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the flush at exit must not fail again
    except SystemExit as stop:
        if not isinstance(stop.__context__, BrokenPipeError):  # rich's way to say the same
            raise
