"""What TensorRT calls back during a build: progress, log, and the stream the engine is written to; and ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

Report = Callable[[str, int, int], None]
"""Told the phase, the steps done and the steps to do."""


@contextmanager
def signals_kept() -> Iterator[list[int]]:
    """Ctrl-C and its like are noted in the list while the builder runs, and act when it has ended.

    Their handlers raise; inside a callback TensorRT would swallow that and build on.
    """
    came: list[int] = []
    handlers: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP")):
            if number is not None and callable(handler := signal.getsignal(number)):
                handlers[number] = handler
                signal.signal(number, lambda which, _: came.append(which))
    try:
        yield came
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if came:
            handlers[came[0]](came[0], None)


def make_monitor(trt: Any, report: Report | None, stopped: Sequence[int] = ()) -> Any:
    """An IProgressMonitor: reports the outermost phase at work, and ends the build once `stopped` holds something."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._open: dict[str, int] = {}  # outermost first

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self._open[name] = steps
            self._tell(0, name)

        def step_complete(self, name: str, step: int) -> bool:
            self._tell(step + 1, name)
            return not stopped

        def phase_finish(self, name: str) -> None:
            steps = self._open.pop(name, 0)
            if report and not self._open:
                report(name, steps, steps)

        def _tell(self, done: int, name: str) -> None:
            # Inner phases come by the hundred; the bar stays with the outer one.
            if report and name == next(iter(self._open), name):
                report(name, done, self._open.get(name, 0))

    return Monitor()


_loggers: dict[str, Any] = {}  # TensorRT keeps the first logger it meets for as long as the process lives


def logger_of(trt: Any) -> Any:
    """The ILogger of this process, emptied; it keeps errors and warnings in `told` instead of printing them."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.told: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.told.append(f"error: {message}")
            elif severity == trt.ILogger.WARNING:
                self.told.append(f"warning: {message}")

    logger = _loggers.setdefault(trt.__name__, Log())
    logger.told = []
    return logger


def make_writer(trt: Any, file: BinaryIO) -> Any:
    """An IStreamWriter into `file`; what went wrong is in its `problem`."""

    class Writer(trt.IStreamWriter):
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.problem: OSError | None = None

        def write(self, data: Any) -> int:
            try:
                return file.write(data)
            except OSError as error:  # an exception must not cross into the builder
                self.problem = error
                return 0

    return Writer()
