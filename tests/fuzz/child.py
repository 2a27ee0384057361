"""One case in a process of its own: forked from one that has imported everything, bounded, watched from outside."""

from __future__ import annotations

import ctypes
import faulthandler
import json
import logging
import os
import resource
import select
import shutil
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .case import Base, Case, Draw
from .shortcut import Described, traces_shared
from .targets import TARGETS

SECONDS = 20
TRACE = 60  # more, where a graph is traced anew
BYTES = 2 << 30  # of memory that a case may use
ADDRESSES = 6 << 30  # beyond what the parent has mapped: reserved memory is not used memory, threads reserve a lot
_DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG of linux/prctl.h
TRACEBACK, MUTATOR, DESCRIBED = 70, 71, 72  # exit statuses of a child, beside those of the command


def memory_of_this_process() -> int:
    """Bytes that a child starts with: neither those of a peak before, nor those of mapped files."""
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("RssAnon:") + 1]) * 1024


@dataclass
class Outcome:
    """What one case came to, as seen from outside; `status` is negative for a signal, None for a case cut off."""

    target: str
    number: int
    done: str
    commands: list[list[str]]
    must_refuse: bool
    right: list[int] | None
    status: int | None
    seconds: float
    peak: int
    stdout: str
    stderr: str
    left: list[str]  # what stayed in the output and temporary folders
    elsewhere: list[str]  # what changed outside


class Runner:
    """Runs cases one after the other in a folder of its own."""

    def __init__(self, folder: Path, base: Base, seed: int, real_traces: int = 0) -> None:
        """`real_traces`: of one accepted checkpoint in so many the graph is traced anew; 0: of none."""
        self.folder, self._base, self._seed, self._real = folder, base, seed, real_traces
        shutil.rmtree(folder, ignore_errors=True)
        for name in ("canary", "home"):
            (folder / name).mkdir(parents=True)
        (folder / "canary" / "file").write_text("this stays as it is")

    def run(self, target: str, number: int) -> Outcome:
        """One case; always the same for the same seed."""
        for name in ("case", "temporary"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
            (self.folder / name).mkdir()
        (self.folder / "case" / "out").mkdir()
        anew = bool(self._real) and Draw(self._seed, f"trace {target}", number).randrange(self._real) == 0
        before, start = self._watched(), time.perf_counter()
        process = os.fork()
        if process == 0:
            self._child(target, number, anew)
        status, usage = _wait(process, SECONDS + (TRACE if anew else 0))
        seconds = time.perf_counter() - start
        told = json.loads(self._text("told.json") or "{}")
        after = self._watched()
        changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        left = [
            str(path.relative_to(self.folder))
            for place in ("case/out", "temporary")
            for path in (self.folder / place).iterdir()
        ]
        return Outcome(
            target,
            number,
            told.get("done", ""),
            told.get("commands", []),
            told.get("must_refuse", False),
            told.get("tokens"),
            status,
            seconds,
            usage.ru_maxrss * 1024,
            self._text("stdout"),
            self._text("stderr"),
            left,
            changed,
        )

    def _text(self, name: str) -> str:
        path = self.folder / name
        if not path.exists():
            return ""
        with path.open("rb") as file:
            return file.read(1 << 20).decode(errors="replace")

    def _watched(self) -> dict[str, tuple[int, int]]:
        found = {}
        for place in (self.folder / "canary", self.folder / "home", self._base.folder):
            for path in place.rglob("*"):
                stat = path.lstat()
                found[str(path)] = (stat.st_size, stat.st_mtime_ns)
        return found

    def _child(self, target: str, number: int, anew: bool) -> None:
        status = MUTATOR
        try:
            os.setsid()
            faulthandler.disable()  # pytest's writes to a terminal
            ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, signal.SIGKILL)
            (self.folder / "told.json").unlink(missing_ok=True)
            for name, stream in (("stdout", 1), ("stderr", 2)):
                os.dup2(os.open(self.folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
            sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115  whatever had taken its place
            sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115
            os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
            os.environ.update(
                HOME=str(self.folder / "home"),
                TMPDIR=str(self.folder / "temporary"),
                HF_HUB_OFFLINE="1",
                RUST_BACKTRACE="0",
                TORCHINDUCTOR_CACHE_DIR=str(self.folder / "torch"),
                MPLCONFIGDIR=str(self.folder / "plots"),
            )
            os.chdir(self.folder / "case")
            case = TARGETS[target][0](Draw(self._seed, target, number), self._base, self.folder / "case")
            (self.folder / "told.json").write_text(
                json.dumps(
                    {
                        "done": case.done,
                        "commands": case.commands,
                        "must_refuse": case.must_refuse,
                        "tokens": case.tokens,
                    }
                )
            )
            with traces_shared(self._base.folder.parent / "traces", traced_anew=anew):
                _limit()
                status = _run(case)
        except BaseException:
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                try:
                    stream.flush()
                except (OSError, ValueError):
                    status = status or TRACEBACK
            os._exit(status)


def _limit() -> None:
    with Path("/proc/self/statm").open() as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + ADDRESSES,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (4 * SECONDS,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _run(case: Case) -> int:
    from dmoe_export.cli import main
    from dmoe_export.errors import DmoeError

    try:
        if case.call:
            logging.getLogger("dmoe_export").addHandler(logging.NullHandler())  # warnings are for the caller's log
            try:
                print(json.dumps({"answers": [g.token_ids for g in case.call()]}))
            except DmoeError as error:
                print(f"dmoe-export: {error}", file=sys.stderr)
                return error.exit_code
        for command in case.commands:
            print(f"$ {command[0]}", flush=True)
            try:
                main(command, prog_name="dmoe-export")
            except SystemExit as stop:
                if stop.code:
                    return stop.code if isinstance(stop.code, int) else TRACEBACK
            sys.stdout.flush()
    except Described:
        return DESCRIBED
    except BaseException:
        traceback.print_exc()
        return TRACEBACK
    return 0


def _wait(process: int, seconds: float) -> tuple[int | None, Any]:
    """Exit status and use of a child, which is killed where it takes too long."""
    handle = os.pidfd_open(process)
    try:
        ready, _, _ = select.select([handle], [], [], seconds)
    finally:
        os.close(handle)
    try:
        os.killpg(process, signal.SIGKILL)  # and whatever it started
    except ProcessLookupError:
        os.kill(process, signal.SIGKILL)
    _, status, usage = os.wait4(process, 0)
    return (os.waitstatus_to_exitcode(status) if ready else None), usage
