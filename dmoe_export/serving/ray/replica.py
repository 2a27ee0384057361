"""A replica: one bundle in a process of its own, asked over Serve's handles. Knows no Ray but for its metrics."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from ..asked import Ask, Ending, Facts, Key
from ..errors import ApiError
from ..metrics import Metrics
from ..opening import open_engine
from .settings import Settings
from .wire import MOST_REPEATS, attempt_key

_NO_LIMIT = 1 << 20  # requests that wait inside: Serve gives no more than it was told


class Replica:
    """What the deployment of replicas is made of; methods are called in Serve's event loop for its user's code."""

    def __init__(self, settings: Settings, name: str, metrics: Metrics) -> None:
        """Opens the bundle, so it takes as long as verifying does; raises its errors."""
        self._engine = open_engine(name, settings.bundle, slots=settings.max_batch, max_waiting=_NO_LIMIT,
                                   prefix_cache=settings.prefix_cache, metrics=metrics, memory=settings.memory,
                                   **settings.opening)

    async def answer(self, ask: Ask) -> AsyncIterator[Any]:
        """The items of a `Stream`; an error is one, too: what is raised Serve logs as a fault of its own."""
        try:
            job = await self._engine.enter(ask)
            try:
                yield job.course
                async for item in job.items():
                    yield item
                yield job.course
            finally:
                job.cancel("disconnected")  # of an ended one nothing
        except ApiError as error:
            yield error

    async def cancel(self, key: Key, why: Ending) -> bool:
        """End a request, whichever attempt of it is here; whether there is one."""
        jobs = [self._engine.jobs.get(attempt_key(key, attempt)) for attempt in range(MOST_REPEATS + 1)]
        for job in jobs:
            if job is not None:
                job.cancel(why)
        return any(job is not None for job in jobs)

    async def facts(self) -> Facts:
        """Of the bundle."""
        return await self._engine.facts()

    async def ready(self) -> bool:
        """Whether requests can be answered."""
        return await self._engine.ready()

    async def check_health(self) -> None:
        """Serve replaces a replica in which this raises."""
        if not await self._engine.ready():
            raise RuntimeError(f"Model {self._engine.name} has failed.")

    def __del__(self) -> None:
        """Serve calls it once the replica's requests have ended, or their time has."""
        if hasattr(self, "_engine"):
            self._engine.close()
