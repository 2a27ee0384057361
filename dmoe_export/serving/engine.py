"""A bundle in this process as a `Model`: requests are admitted, encoded and handed to the thread with the batch."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from ..decoding.option import OFF
from ..decoding.settings import OPTIONS
from ..errors import DmoeError
from ..generator import Generator
from ..text.pieces import Pieces
from .asked import Ask, Facts, Key
from .errors import ApiError, of_bundle
from .job import Job, Row
from .metrics import Metrics
from .seen import model_facts
from .shown import requested, shown_of
from .worker import Worker

_ENCODERS = 2  # threads that render templates and encode


class Engine:
    """Answers requests with one bundle. Methods are for the event loop's thread; the batch belongs to another.

    At most `slots` + `max_waiting` requests are in it, those being encoded included; more are refused (429).
    """

    def __init__(self, name: str, generator: Generator, slots: int, max_waiting: int, metrics: Metrics,
                 prefix_cache: str | None = None) -> None:
        """`prefix_cache`: see `Generator.batch`, whose errors it raises."""
        self.name, self.generator, self.slots, self.max_waiting = name, generator, slots, max_waiting
        self._metrics = metrics.of(name)
        self._lock = threading.Lock()
        self._admitted = set[Key]()
        self._draining = False
        self._usual = 1.0  # seconds of a request in the batch
        self._encoders = ThreadPoolExecutor(_ENCODERS, f"encode-{name}")
        self.worker = Worker(name, generator, slots, prefix_cache, self._metrics, self._over)

    async def enter(self, ask: Ask, gone: Callable[[], bool] | None = None) -> Job:
        """Encode and check a request, and let its rows wait; raises ApiError.

        `gone`: asked in the engine's thread before each forward whether the client has left; it must not raise.
        """
        self._admit(ask.key)
        try:
            loop, rows = asyncio.get_running_loop(), list[Row]()
            for number, prompt in enumerate(ask.prompts):
                request = await loop.run_in_executor(self._encoders, partial(requested, self.generator, ask, prompt))
                mine = list(range(number * ask.choices, (number + 1) * ask.choices))
                alike = request.settings.temperature == 0  # no chance in it: decoded once
                rows += [Row(request, choices, shown_of(request, ask, self.generator))
                         for choices in ([mine] if alike else [[one] for one in mine])]
            job = Job(ask, rows, Pieces(self.generator.text) if ask.watched else None, gone)
            self.worker.add(job)
        except BaseException as error:
            self._leave(ask.key)
            if isinstance(error, DmoeError):
                raise of_bundle(error, self.generator.bundle.folder, self.name) from None
            raise
        return job

    async def facts(self) -> Facts:
        """What clients may know of the bundle."""
        backend, defaults = self.generator.backend, self.generator.defaults
        most, limits = backend.description.max_positions, backend.limits
        usual = {name: int(defaults.values(name).get("max_new_tokens", OPTIONS["max_new_tokens"].default))
                 for name in (None, OFF, *defaults.presets)}
        return Facts(self.name, min(most, (limits and limits.max_context) or most),
                     backend.description.step_tokens(backend.routing), usual[None],
                     model_facts(self.name, self.generator.bundle, defaults),
                     {name: tokens for name, tokens in usual.items() if name})

    async def cancel(self, key: Key) -> bool:
        """End a request in progress at the next step; whether there is one."""
        job = self.jobs.get(key)
        if job is not None:
            job.cancel("cancelled")
        return job is not None

    @property
    def jobs(self) -> dict[Key, Job]:
        """Requests that wait or are decoded."""
        return self.worker.jobs

    @property
    def alive(self) -> bool:
        """Whether new requests are taken."""
        return self.worker.alive and not self._draining

    async def ready(self) -> bool:
        """Whether new requests are taken and can be answered: a lost file of the bundle stays lost."""
        return self.alive and not self.worker.broken

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
            job.cancel("cancelled")

    def close(self) -> None:
        """End the thread and free the bundle; what still runs is lost."""
        self.worker.close()
        self._encoders.shutdown(wait=False, cancel_futures=True)
        self.generator.close()

    def _admit(self, key: Key) -> None:
        if not self.worker.alive:
            raise self.worker.failed()
        if self._draining:
            raise ApiError(503, f"Model {self.name} takes no more requests, the server is shutting down.",
                           code="shutting_down", headers={"retry-after": "5", "connection": "close"})
        with self._lock:
            if key in self._admitted:
                raise ApiError(400, "x-request-id is that of a request in progress; leave it out or choose another.",
                               code="request_id_in_use")
            if len(self._admitted) >= self.slots + self.max_waiting:
                after = min(max(math.ceil(self._usual * (1 + self.worker.waiting / self.slots)), 1), 60)
                raise ApiError(429, f"Model {self.name} has {len(self._admitted)} requests, the most it takes; try "
                               "again later.", code="queue_full", headers={"retry-after": str(after)})
            self._admitted.add(key)
            self._metrics.jobs.set(len(self._admitted))

    def _over(self, job: Job, in_batch: float) -> None:
        """From the engine's thread: a job has ended, after so many seconds in the batch."""
        self._usual = 0.9 * self._usual + 0.1 * in_batch
        self._leave(job.ask.key)

    def _leave(self, key: Key) -> None:
        with self._lock:
            self._admitted.discard(key)
            self._metrics.jobs.set(len(self._admitted))

