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
from .help import SETTINGS, Verbs
from .output import reader_may_leave, say, warnings_said

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


MEMBERS = {
    "export": ("export:export", "A checkpoint becomes a bundle: a folder that generates text without PyTorch."),
    "inspect": ("inspect:inspect", "Verify a bundle and show what it holds."),
    "generate": ("generate:generate", "Answer a prompt with a bundle."),
    "score": ("score:score", "Say how probable given answers are."),
    "serve": ("serve:serve", "Serve bundles to OpenAI's clients over HTTP."),
    "deploy": ("deploy:deploy", "Write the files with which Ray Serve, Triton or Kubernetes runs a bundle."),
    "check": ("check:check", "Prove a bundle's numbers against its checkpoint, layer by layer."),
    "build": ("build:build", "Build TensorRT engine files into a bundle; needs no GPU."),
    "bench": ("bench:bench", "Measure speed and memory."),
    "completion": ("completion:completion", "Print what makes a shell complete verbs and options."),
}


class OneSentenceErrors(Verbs):
    """Turns expected errors into one sentence and the right exit code; `--debug` adds the stack trace."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Take `--debug` after the verb, too."""
        if "--debug" in args:
            args = ["--debug", *(a for a in args if a != "--debug")]
        with _usage_in_one_sentence():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb."""
        try:
            with _stopped_by_signals(), reader_may_leave(), warnings_said(), _usage_in_one_sentence():
                return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            say("dmoe-export: Stopped.", err=True)
            sys.exit(128 + signal.SIGINT)
        except Exception as error:
            if ctx.params.get("debug"):
                traceback.print_exc()
            if isinstance(error, DmoeError):
                say(f"dmoe-export: {error}", err=True)
                sys.exit(error.exit_code)
            if isinstance(error, OSError) and (error.filename or error.errno in _DISK_FULL):
                say(f"dmoe-export: {error.filename or 'Output'}: {error.strerror}.", err=True)
                sys.exit(2)
            say(f"dmoe-export: unexpected {type(error).__name__}: {error} (run with --debug for the trace, and please "
                "report it)", err=True)
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


class _Usage(click.ClickException):
    """What was wrong with the words of a command."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        """As every other error."""
        say(f"dmoe-export: {self.message}", err=True)


@contextmanager
def _usage_in_one_sentence() -> Iterator[None]:
    """What was wrong, and whose help to read; click prints the usage line before it."""
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        verb = error.ctx.command_path if error.ctx else "dmoe-export"
        said = error.format_message()
        raise _Usage(f"{said}{'' if said.endswith(('.', '?', '?)')) else '.'} See {verb} --help.") from None


@click.group(cls=OneSentenceErrors, members=MEMBERS, context_settings=SETTINGS)
@click.option("--debug", is_flag=True, help="Show the stack trace of an error; may stand after the verb, too.")
@click.version_option(__version__, prog_name="dmoe-export")
def main(debug: bool) -> None:
    """Mixture-of-experts diffusion language models: from a checkpoint to bundles that generate text."""
