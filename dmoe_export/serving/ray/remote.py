"""The `Model` of a process that holds none itself: its replicas are at the other end of a `Wire`. Knows no Ray."""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any

from ..asked import Ask, Ending, Facts, Key
from ..errors import ApiError
from .answer import RemoteAnswer
from .wire import Wire

_FACTS_SECONDS = 10.0  # to find a replica that tells what the model is
_TELL_SECONDS = 2.0  # for replicas to answer a short call
_READY_KEPT = 1.0  # seconds for which an answer about readiness is true


class RemoteModel:
    """Methods are for the event loop's thread."""

    def __init__(self, name: str, wire: Wire) -> None:
        self.name, self.wire = name, wire
        self._answers: dict[Key, RemoteAnswer] = {}  # from arrival to end
        self._facts: Facts | None = None
        self._ready, self._ready_at = False, float("-inf")
        self._draining, self._usual = False, 1.0  # usual: seconds of a request
        self._tasks = set[asyncio.Task[Any]]()

    @property
    def busy(self) -> int:
        """Requests in progress."""
        return len(self._answers)

    async def facts(self) -> Facts:
        """What a replica says of its bundle, asked once; raises ApiError where none answers."""
        end = time.monotonic() + _FACTS_SECONDS
        while self._facts is None:
            told = await self.wire.tell("facts", seconds=_TELL_SECONDS)
            self._facts = next(iter(told), None)
            if self._facts is None and time.monotonic() > end:
                raise self.nobody()
            if self._facts is None:
                await asyncio.sleep(0.2)
        return self._facts

    async def ready(self) -> bool:
        """Whether a replica takes requests and can answer them; asked once a second at most."""
        if time.monotonic() > self._ready_at + _READY_KEPT:
            told = await self.wire.tell("ready", seconds=_TELL_SECONDS)
            self._ready, self._ready_at = any(told), time.monotonic()
        return self._ready and not self._draining

    async def enter(self, ask: Ask) -> RemoteAnswer:
        """Give a request to a replica, and wait until it has taken it; raises ApiError."""
        if self._draining:
            raise ApiError(503, f"Model {self.name} takes no more requests, the server is shutting down.",
                           code="shutting_down", headers={"retry-after": "5"})
        if ask.key in self._answers:
            raise ApiError(400, "x-request-id is that of a request in progress; leave it out or choose another.",
                           code="request_id_in_use")
        answer = self._answers[ask.key] = RemoteAnswer(ask, self)
        await answer.begin()
        return answer

    async def cancel(self, key: Key) -> bool:
        """End a request at the next step, whichever process like this one it came through; whether there is one."""
        if answer := self._answers.get(key):
            answer.cancel("cancelled")
            return True
        return any(await self.wire.tell("cancel", key, "cancelled", seconds=_TELL_SECONDS))

    def drain(self) -> None:
        """Refuse new requests from now on (503)."""
        self._draining = True

    def end_all(self) -> None:
        """Cancel every request."""
        for answer in list(self._answers.values()):
            answer.cancel("cancelled")

    # For its answers.

    def tell_to_end(self, key: Key, why: Ending) -> None:
        """The replica that has a request ends it."""
        task = asyncio.ensure_future(self.wire.tell("cancel", key, why, seconds=_TELL_SECONDS))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def left(self, answer: RemoteAnswer, seconds: float) -> None:
        """An answer has ended, after so many seconds."""
        self._answers.pop(answer.ask.key, None)
        self._usual = 0.9 * self._usual + 0.1 * seconds

    def full(self) -> ApiError:
        """What a request is told that finds as many waiting as may."""
        return ApiError(429, f"Model {self.name} has {len(self._answers) - 1} requests, the most it takes; try again "
                        "later.", code="queue_full",
                        headers={"retry-after": str(min(max(math.ceil(self._usual), 1), 60))})

    def nobody(self) -> ApiError:
        """What a request is told where there is no replica."""
        return ApiError(503, f"No replica of model {self.name} answers.", code="no_replica",
                        headers={"retry-after": "5"})
