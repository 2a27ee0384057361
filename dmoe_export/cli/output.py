"""What is printed: how wide tables are, sentences of one line, and what happens when nobody reads any more."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text


def visible(text: str, keep: str = "") -> str:
    """The text with control characters written out (\\x1b), but those of `keep`.

    Names of files and values of strangers are part of sentences and tables, and must not steer a terminal.
    """
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def say(sentence: object) -> None:
    """One line on standard error."""
    click.echo(f"dmoe-export: {visible(str(sentence))}", err=True)


class _Said(logging.Handler):
    """Warnings of the package as sentences."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one."""
        say(f"warning: {record.getMessage()}")


@contextmanager
def warnings_said() -> Iterator[None]:
    """What the package logs is shown as a warning; without this, Python prints the bare words."""
    log, handler = logging.getLogger("dmoe_export"), _Said(logging.WARNING)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


def cell(value: object) -> Text:
    """Of a table: without rich's markup, which a stranger's name may look like."""
    from rich.text import Text

    return Text(visible(str(value)))


def answer_shown(text: str) -> str:
    """An answer as it is printed: as it is into a file or a pipe, and without what steers a terminal on one."""
    return visible(text, keep="\n\t\u200c\u200d") if sys.stdout.isatty() else text


def console(width: int = 120) -> Console:
    """Of a terminal its own width, else `width`: a file or a pipe has no reason to cut tables."""
    from rich.console import Console  # not for `--version`

    found = Console()
    return found if found.is_terminal else Console(width=width)


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
