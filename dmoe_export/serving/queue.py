"""Rows that wait for a place in the batch."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence

from .job import Job, Row


class Queue:
    """First come, first served, but a request of many rows leaves places to those that have fewer in the batch."""

    def __init__(self) -> None:
        self._rows: dict[Job, deque[Row]] = {}  # jobs in the order of their arrival

    def __len__(self) -> int:
        """Rows in it."""
        return sum(len(rows) for rows in self._rows.values())

    def add(self, job: Job, rows: Sequence[Row]) -> None:
        """A job's rows begin to wait."""
        self._rows[job] = deque(rows)

    def next(self, running: Iterable[Job]) -> tuple[Job, Row] | None:
        """The row whose turn it is, which waits no more; `running`: the job of every row in the batch."""
        if not self._rows:
            return None
        inside = Counter(running)
        job = min(self._rows, key=lambda one: inside[one])  # the first of those with the fewest
        row = self._rows[job].popleft()
        if not self._rows[job]:
            del self._rows[job]
        return job, row

    def drop(self, job: Job) -> list[Row]:
        """A job's rows that waited; they do no more."""
        return list(self._rows.pop(job, ()))
