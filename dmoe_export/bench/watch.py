"""Watches ONNX Runtime sessions that a backend opens: seconds inside their calls, and ONNX Runtime's own profile.

The sessions are watched from outside, by a subclass in the library's place while the backend opens, so a backend has no
code for it and what is measured is what runs everywhere else.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..runtime.ort import ort


class Watch:
    """What the watched sessions did."""

    def __init__(self, profile: Path | None) -> None:
        self.profile = profile
        self.seconds = 0.0  # inside session calls
        self.calls = 0
        self.sessions: list[Any] = []

    def end_profiling(self) -> list[Path]:
        """Write the profiles; one file a session."""
        return [Path(session.end_profiling()) for session in self.sessions]


@contextmanager
def watched(profile: Path | None = None) -> Iterator[Watch]:
    """Sessions opened inside belong to the yielded watch, for as long as they live.

    `profile`: beginning of the names of profile files; profiling slows a session, so do not time one that has it.
    """
    watch, original = Watch(profile), ort.InferenceSession

    class Watched(original):  # type: ignore[misc, valid-type]
        def __init__(self, model: Any, sess_options: Any = None, *args: Any, **kwargs: Any) -> None:
            if profile is not None:
                sess_options = sess_options or ort.SessionOptions()
                sess_options.enable_profiling = True
                sess_options.profile_file_prefix = str(profile)
            super().__init__(model, sess_options, *args, **kwargs)
            watch.sessions.append(self)

    for name in ("run", "run_with_iobinding", "run_with_ort_values"):
        setattr(Watched, name, _timed(getattr(original, name), watch))
    ort.InferenceSession = Watched
    try:
        yield watch
    finally:
        ort.InferenceSession = original


def _timed(method: Any, watch: Watch) -> Any:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return method(self, *args, **kwargs)
        finally:
            watch.seconds += time.perf_counter() - start
            watch.calls += 1

    return call
