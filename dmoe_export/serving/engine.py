"""The thread that owns a bundle's batch: rows join it whenever a place is free, in the order of `Queue`."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from ..batch import Batch
from ..decoding.answer import Block
from ..decoding.batch import Handle
from ..decoding.telemetry import Statistics
from ..errors import BundleError, DmoeError, RequestError
from ..generator import Generator
from .errors import FAILED, ApiError, of_bundle, where
from .job import Ending, Job, Row
from .metrics import Metrics
from .queue import Queue

_ENCODERS = 2  # threads that render templates and encode


class Engine:
    """Answers requests with one bundle. Methods are for the event loop's thread; the batch belongs to another.

    At most `slots` + `max_waiting` requests are in it, those being encoded included; more are refused (429).
    """

    def __init__(self, name: str, generator: Generator, slots: int, max_waiting: int, metrics: Metrics,
                 prefix_cache: str | None = None) -> None:
        """`prefix_cache`: see `Generator.batch`, whose errors it raises."""
        self.name, self.generator, self.slots, self.max_waiting = name, generator, slots, max_waiting
        self.jobs: dict[tuple[int, str], Job] = {}  # by owner and id, from arrival to end
        self._metrics, self._log = metrics.of(name), logging.getLogger("dmoe_export.serving")
        self._waiting = Queue()
        self._running: dict[Handle, tuple[Job, Row]] = {}
        self._lock = threading.Condition()
        self._admitted = set[tuple[int, str]]()
        self._broken = self._ended = self._draining = False
        self._usual = 1.0  # usual: seconds of a request in the batch
        self._encoders = ThreadPoolExecutor(_ENCODERS, f"encode-{name}")
        self._prefix_cache = prefix_cache
        self._batch = self._new_batch()
        self._thread = threading.Thread(target=self._run, name=f"engine-{name}", daemon=True)
        self._thread.start()

    # On the event loop.

    async def submit(self, key: tuple[int, str], prompts: Sequence[Any], chat: bool, options: dict[str, Any],
                     choices: int, timeout: float, seen: Callable[[Any], object] | None = None) -> Job:
        """Encode and check `prompts`, and let their rows wait; choice c of prompt p is p · choices + c.

        `seen`: given every StepSeen, in the engine's thread; what it returns is among the job's items. Raises ApiError.
        """
        self._admit(key)
        entered = time.monotonic()
        try:
            loop, rows = asyncio.get_running_loop(), list[Row]()
            for number, prompt in enumerate(prompts):
                request = await loop.run_in_executor(
                    self._encoders, partial(self.generator.request, prompt, chat=chat, **options))
                mine = list(range(number * choices, (number + 1) * choices))
                alike = request.settings.temperature == 0  # no chance in it: decoded once
                rows += [Row(request, mine)] if alike else [Row(request, [one]) for one in mine]
        except BaseException as error:
            self._leave(key)
            if isinstance(error, DmoeError):
                raise of_bundle(error, self.generator.bundle.folder, self.name) from None
            raise
        job = Job(key, rows, timeout, seen, entered)
        with self._lock:
            if self._ended:  # meanwhile
                self._leave(key)
                raise self._failed()
            self.jobs[key] = job
            self._waiting.add(job, rows)
            self._metrics.waiting.set(len(self._waiting))
            self._lock.notify()
        return job

    def cancel(self, job: Job, why: Ending) -> None:
        """End a job at the next step; of an ended one nothing."""
        with self._lock:
            if job.over is None and job.ending is None:
                job.ending = why
                self._lock.notify()

    @property
    def alive(self) -> bool:
        """Whether new requests are taken."""
        return self._thread.is_alive() and not self._draining

    @property
    def ready(self) -> bool:
        """Whether new requests are taken and can be answered: a lost file of the bundle stays lost."""
        return self.alive and not self._broken

    @property
    def busy(self) -> int:
        """Requests that wait, are encoded or decoded."""
        return len(self._admitted)

    def drain(self) -> None:
        """Refuse new requests from now on (503)."""
        self._draining = True

    def end_all(self) -> None:
        """Cancel every request."""
        for job in list(self.jobs.values()):
            self.cancel(job, "cancelled")

    def close(self) -> None:
        """End the thread and free the bundle; what still runs is lost."""
        with self._lock:
            self._ended = True
            self._lock.notify()
        self._thread.join()
        self._encoders.shutdown(wait=False, cancel_futures=True)
        self.generator.close()

    def _admit(self, key: tuple[int, str]) -> None:
        with self._lock:
            if self._ended:
                raise self._failed()
            if self._draining:
                raise ApiError(503, f"Model {self.name} takes no more requests, the server is shutting down.",
                               code="shutting_down", headers={"retry-after": "5"})
            if key in self._admitted:
                raise ApiError(400, "x-request-id is that of a request in progress; leave it out or choose another.",
                               code="request_id_in_use")
            if len(self._admitted) >= self.slots + self.max_waiting:
                after = min(max(math.ceil(self._usual * (1 + len(self._waiting) / self.slots)), 1), 60)
                raise ApiError(429, f"Model {self.name} has {len(self._admitted)} requests, the most it takes; try "
                               "again later.", code="queue_full", headers={"retry-after": str(after)})
            self._admitted.add(key)
            self._metrics.jobs.set(len(self._admitted))

    def _failed(self) -> ApiError:
        return ApiError(503, f"Model {self.name} has failed.", code="model_failed")

    def _leave(self, key: tuple[int, str]) -> None:
        with self._lock:
            self._admitted.discard(key)
            self._metrics.jobs.set(len(self._admitted))

    # In the engine's thread.

    def _new_batch(self) -> Batch:
        return self.generator.batch(slots=self.slots, prefix_cache=self._prefix_cache)

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
        """Jobs that were cancelled, or whose time is over."""
        now = time.monotonic()
        with self._lock:
            jobs = list(self.jobs.values())
        for job in jobs:
            if job.ending is None and now > job.deadline:
                job.ending = "timeout"
            if job.ending is None:
                continue
            waiting = self._not_wait(job)
            if waiting and job.ending == "timeout" and job.began is None:
                self._fail(job, ApiError(503, f"No place in the batch became free within {job.timeout:g} seconds.",
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
            if job.began is None:
                job.began = time.monotonic()
                self._metrics.queued.observe(job.began - job.entered)
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
            if job.first is None:
                self._metrics.first.observe(time.monotonic() - job.entered)
            job.post(row, event.block)
            if event.last:
                self._row_ended(job, event.block.stats)
        self._count()

    def _row_ended(self, job: Job, statistics: Statistics | None) -> None:
        """`statistics`: None of a row that never joined."""
        if statistics:
            job.statistics.append(statistics)
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
            self.jobs.pop(job.key, None)
            self._usual = 0.9 * self._usual + 0.1 * (job.over - (job.began or job.over))
        self._leave(job.key)
        self._metrics.seconds.observe(job.over - job.entered)
        job.put(error)

    def _told(self, error: Exception, job: Job) -> ApiError:
        """What a client reads; what it cannot know is in the log, without the words of an error that may quote it."""
        self._broken |= isinstance(error, BundleError)
        if isinstance(error, DmoeError):
            if not isinstance(error, RequestError):  # it is not the client's
                self._log.error("request %s failed: %s", job.key[1], error)
            return of_bundle(error, self.generator.bundle.folder, self.name)
        self._log.error("request %s failed: %s at %s", job.key[1], type(error).__name__, where(error))
        return ApiError(500, FAILED, code="internal_error")

    def _start_anew(self, error: Exception) -> None:
        """A batch that failed as a whole is left, and its requests with it; others go on in a new one."""
        self._log.error("the batch of %s failed: %s at %s", self.name, type(error).__name__, where(error))
        for job in {job for job, _ in self._running.values()}:
            self._fail(job, ApiError(500, FAILED, code="internal_error"))
        self._running.clear()
        try:
            self._batch = self._new_batch()
        except Exception as again:
            self._log.error("no new batch of %s: %s at %s", self.name, type(again).__name__, where(again))
            with self._lock:
                self._ended, jobs = True, list(self.jobs.values())
            for job in jobs:
                self._fail(job, self._failed())

    def _count(self) -> None:
        self._metrics.waiting.set(len(self._waiting))
        self._metrics.running.set(len(self._running))
        self._metrics.cached.set(sum(handle.row.cached for handle in self._running))
        if self._batch.prefixes:
            self._metrics.kept.set(self._batch.prefixes.statistics().bytes)
