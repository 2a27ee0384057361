"""The thread that owns a bundle's batch: rows join it whenever a place is free, in the order of `Queue`."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from ..batch import Batch
from ..decoding.answer import Block
from ..decoding.batch import Handle
from ..decoding.telemetry import Statistics
from ..errors import BundleError, DmoeError, RequestError
from ..generator import Generator
from .asked import Key
from .errors import FAILED, ApiError, of_bundle, where
from .job import Job, Row
from .metrics import Metrics
from .queue import Queue


class Worker:
    """Decodes jobs until it is closed, or no batch can be had any more."""

    def __init__(self, name: str, generator: Generator, slots: int, prefix_cache: str | None, metrics: Metrics,
                 over: Callable[[Job, float], None]) -> None:
        """`metrics` of the model; `over`: called in the thread for each job that has ended, with its seconds in the
        batch. `prefix_cache`: see `Generator.batch`, whose errors it raises."""
        self.jobs: dict[Key, Job] = {}  # from when they wait to their end
        self.broken = False  # a file of the bundle is lost
        self._name, self._generator, self._slots, self._prefix_cache = name, generator, slots, prefix_cache
        self._metrics, self._told_over = metrics, over
        self._log = logging.getLogger("dmoe_export.serving")
        self._waiting, self._running = Queue(), dict[Handle, tuple[Job, Row]]()
        self._lock, self._ended = threading.Condition(), False
        self._batch = self._new_batch()
        self._thread = threading.Thread(target=self._run, name=f"engine-{name}", daemon=True)
        self._thread.start()

    # From any thread.

    def add(self, job: Job) -> None:
        """Its rows wait for the batch; raises ApiError once the thread has ended."""
        with self._lock:
            if self._ended:
                raise self.failed()
            self.jobs[job.ask.key] = job
            self._waiting.add(job, job.rows)
            self._metrics.waiting.set(len(self._waiting))
            self._lock.notify()

    @property
    def alive(self) -> bool:
        """Whether jobs are taken."""
        return self._thread.is_alive() and not self._ended

    @property
    def waiting(self) -> int:
        """Rows that wait."""
        return len(self._waiting)

    def failed(self) -> ApiError:
        """What a request is told once the thread has ended."""
        return ApiError(503, f"Model {self._name} has failed.", code="model_failed")

    def close(self) -> None:
        """End the thread; what still runs is lost."""
        with self._lock:
            self._ended = True
            self._lock.notify()
        self._thread.join()

    # In the thread.

    def _new_batch(self) -> Batch:
        return self._generator.batch(slots=self._slots, prefix_cache=self._prefix_cache)

    def _run(self) -> None:
        while True:
            with self._lock:
                while not (self._ended or self._waiting or len(self._batch)):
                    self._lock.wait()
                if self._ended:
                    return
            try:
                self._end_early()
                self._join()
                if len(self._batch):
                    self._step()
            except Exception as error:  # of the batch as a whole: no request is its cause alone
                self._start_anew(error)

    def _end_early(self) -> None:
        """Jobs that were cancelled, whose client has left, or whose time is over."""
        now = time.monotonic()
        with self._lock:
            jobs = list(self.jobs.values())
        for job in jobs:
            if job.ending is None and job.gone is not None and job.gone():
                job.ending = "disconnected"
            if job.ending is None and now > job.deadline:
                job.ending = "timeout"
            if job.ending is None:
                continue
            waiting = self._not_wait(job)
            if waiting and job.ending == "timeout" and job.course.queue_seconds is None:
                self._fail(job, ApiError(503, f"No place in the batch became free within {job.ask.timeout:g} seconds.",
                                         code="timeout", headers={"retry-after": "5"}))
                continue
            for handle, (one, _) in self._running.items():
                if one is job:
                    self._batch.cancel(handle)
            for row in waiting:  # they end without a block
                job.post(row, Block(row.choices[0], [], None, "cancelled", Statistics(len(row.request.token_ids), 0)))
                self._row_ended(job, None)

    def _not_wait(self, job: Job) -> list[Row]:
        """A job's rows that waited; they do no more."""
        with self._lock:
            return self._waiting.drop(job)

    def _join(self) -> None:
        """Rows join as long as a place is free; one that the batch refuses ends its request alone."""
        while self._batch.free:
            with self._lock:
                found = self._waiting.next(job for job, _ in self._running.values())
            if found is None:
                break
            job, row = found
            try:
                handle = self._batch.add(row.request, index=row.choices[0], watch=job.watch)
            except Exception as error:
                self._fail(job, self._told(error, job))
                continue
            self._running[handle] = job, row
            if job.course.queue_seconds is None:
                self._metrics.queued.observe(job.began())
        self._count()

    def _step(self) -> None:
        start, rows = time.perf_counter(), len(self._batch)
        events = self._batch.step()
        self._metrics.step.observe(time.perf_counter() - start)
        self._metrics.rows.observe(rows)
        for event in events:
            if event.handle not in self._running:
                continue  # of a job that has failed meanwhile
            job, row = self._running[event.handle]
            if event.last:
                del self._running[event.handle]
            if event.block is None:
                self._fail(job, self._told(event.error or RuntimeError("a row ended without a block"), job))
                continue
            self._metrics.tokens.inc(len(event.block.token_ids))
            if job.course.first_block_seconds is None:
                self._metrics.first.observe(time.monotonic() - job.entered)
            try:
                job.post(row, event.block)
            except Exception as error:  # of what is read of it
                self._fail(job, self._told(error, job))
                continue
            if event.last:
                self._row_ended(job, event.block.stats)
        self._count()

    def _row_ended(self, job: Job, statistics: Statistics | None) -> None:
        """`statistics`: None of a row that never joined."""
        if statistics:
            job.course.statistics.append(statistics)
            self._metrics.row(statistics)
        job.left -= 1
        if not job.left:
            self._over(job, None)

    def _fail(self, job: Job, error: Exception) -> None:
        """End a job with an error; its other rows leave the batch at the next step."""
        self._not_wait(job)
        for handle in [handle for handle, (one, _) in self._running.items() if one is job]:
            del self._running[handle]
            self._batch.cancel(handle)
        if job.over is None:
            self._over(job, error)

    def _over(self, job: Job, error: Exception | None) -> None:
        job.over = time.monotonic()
        with self._lock:
            self.jobs.pop(job.ask.key, None)
        seconds, queued = job.over - job.entered, job.course.queue_seconds
        self._told_over(job, 0.0 if queued is None else seconds - queued)
        self._metrics.seconds.observe(seconds)
        job.put(error)

    def _told(self, error: Exception, job: Job) -> ApiError:
        """What a client reads; what it cannot know is in the log, without the words of an error that may quote it."""
        self.broken |= isinstance(error, BundleError)
        if isinstance(error, DmoeError):
            if not isinstance(error, RequestError):  # it is not the client's
                self._log.error("request %s failed: %s", job.ask.key[1], error)
            return of_bundle(error, self._generator.bundle.folder, self._name)
        self._log.error("request %s failed: %s at %s", job.ask.key[1], type(error).__name__, where(error))
        return ApiError(500, FAILED, code="internal_error")

    def _start_anew(self, error: Exception) -> None:
        """A batch that failed as a whole is left, and its requests with it; others go on in a new one."""
        self._log.error("the batch of %s failed: %s at %s", self._name, type(error).__name__, where(error))
        for job in {job for job, _ in self._running.values()}:
            self._fail(job, ApiError(500, FAILED, code="internal_error"))
        self._running.clear()
        try:
            self._batch = self._new_batch()
        except Exception as again:
            self._log.error("no new batch of %s: %s at %s", self._name, type(again).__name__, where(again))
            with self._lock:
                self._ended, jobs = True, list(self.jobs.values())
            for job in jobs:
                self._fail(job, self.failed())

    def _count(self) -> None:
        self._metrics.waiting.set(len(self._waiting))
        self._metrics.running.set(len(self._running))
        self._metrics.cached.set(sum(handle.row.cached for handle in self._running))
        if self._batch.prefixes:
            self._metrics.kept.set(self._batch.prefixes.statistics().bytes)
