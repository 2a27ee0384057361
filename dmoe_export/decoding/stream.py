"""Results as they come, and how to end them early: from another thread, or with what they come from."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from typing import Generic, TypeVar

from ..errors import RequestError

Result = TypeVar("Result")


class Life:
    """Whether what answers requests is still open."""

    def __init__(self, folder: str) -> None:
        self._folder, self._over = folder, threading.Event()

    def end(self) -> None:
        """From now on `check` raises."""
        self._over.set()

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self._over.is_set()

    def check(self) -> None:
        """Raise RequestError after the end."""
        if self.over:
            raise RequestError(f"The generator of {self._folder} was closed; open the bundle again.")


class Stream(Generic[Result]):
    """An iterator over results that stops when it is asked to. Nothing runs but inside `next`.

    Threads that take from one stream take turns; `cancel` and `close` may be called from any.
    """

    def __init__(self, start: Callable[[Callable[[], bool]], Generator[Result, None, None]], life: Life,
                 cancel: threading.Event | None = None) -> None:
        """`start`: given a function that says whether to stop, the results. `cancel`: the caller's own way to ask.

        Raises RequestError for a `cancel` that is no event.
        """
        if cancel is not None and not callable(getattr(cancel, "is_set", None)):
            raise RequestError(f"cancel is {cancel!r}, it must be a threading.Event.")
        mine = self._mine = threading.Event()

        def asked() -> bool:
            life.check()
            return mine.is_set() or (cancel is not None and cancel.is_set())

        self._life, self._turn, self._inside = life, threading.RLock(), False
        self._results, self._ended = start(asked), False

    def __iter__(self) -> Iterator[Result]:
        return self

    def __next__(self) -> Result:
        with self._turn:
            if not self._ended:
                self._life.check()
            self._inside = True
            try:
                return next(self._results)
            except BaseException:
                self._ended = True
                raise
            finally:
                self._inside = False

    def cancel(self) -> None:
        """Stop at the next look between forwards: what is left then are last blocks with finish_reason "cancelled"."""
        self._mine.set()

    def close(self) -> None:
        """Stop and free what it holds; waits for a forward in progress. There are no more results."""
        self.cancel()
        with self._turn:
            if not self._inside:  # a signal handler of the thread that runs it: it ends by itself
                self._results.close()
                self._ended |= not self._life.over  # else `next` says so
