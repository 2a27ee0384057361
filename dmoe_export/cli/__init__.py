"""The command line: one command, a verb per file. Exit codes: 0 ok, 1 check failed, 2 bad input, 3 environment.

130, 143, 129: stopped by ctrl-C, SIGTERM, SIGHUP.
"""

from __future__ import annotations

import errno
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from .. import __version__
from ..errors import DmoeError
from .output import reader_may_leave

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class OneSentenceErrors(click.Group):
    """Turns expected errors into one sentence and the right exit code; `--debug` adds the stack trace."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Take `--debug` after the verb, too."""
        if "--debug" in args:
            args = ["--debug", *(a for a in args if a != "--debug")]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb."""
        try:
            with _stopped_by_signals(), reader_may_leave():
                return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            click.echo("dmoe-export: Stopped.", err=True)
            sys.exit(128 + signal.SIGINT)
        except Exception as error:
            if ctx.params.get("debug"):
                traceback.print_exc()
            if isinstance(error, DmoeError):
                click.echo(f"dmoe-export: {error}", err=True)
                sys.exit(error.exit_code)
            if isinstance(error, OSError) and (error.filename or error.errno in _DISK_FULL):
                click.echo(f"dmoe-export: {error.filename or 'Output'}: {error.strerror}.", err=True)
                sys.exit(2)
            click.echo(f"dmoe-export: unexpected {type(error).__name__}: {error} (run with --debug for the trace, "
                       "and please report it)", err=True)
            sys.exit(1)


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP unwind as ctrl-C does, so that nothing half-made is left behind."""

    def stop(number: int, _: Any) -> None:
        sys.exit(128 + number)

    names = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    try:
        before = {number: signal.signal(number, stop) for number in names
                  if signal.getsignal(number) is signal.SIG_DFL}  # nohup's choice stays
    except ValueError:  # not the main thread: the program around us has its own ways
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@click.group(cls=OneSentenceErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show the stack trace of an error.")
@click.version_option(__version__, prog_name="dmoe-export")
def main(debug: bool) -> None:
    """Mixture-of-experts diffusion language models: from a checkpoint to bundles that generate text."""


def _register() -> None:
    from . import bench, build, check, export, generate, inspect

    for command in (bench.bench, build.build, check.check, export.export, generate.generate, inspect.inspect):
        main.add_command(command)


_register()
