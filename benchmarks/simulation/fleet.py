"""Replicas, who gets a request, and the clock: events in the order of their time."""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from dmoe_export.bench.serve_load import Answered, Asked, Counts
from dmoe_export.decoding.batch import Handle, JoiningBatch
from dmoe_export.decoding.settings import DecodeSettings
from dmoe_export.serving.queue import Queue

from .backend import TimedBackend
from .steps import StepTimes

Route = Literal["least", "two", "random"]
ROUTES: tuple[Route, ...] = get_args(Route)


def choose(ongoing: Sequence[int], route: Route, rng: np.random.Generator) -> int:
    """The replica of a request, by how many requests each has.

    least: the first of those with the fewest; two: of two random ones, as Ray Serve's; random: any.
    """
    if route == "least":
        return int(np.argmin(ongoing))
    among = rng.permutation(len(ongoing))[:2 if route == "two" else 1].tolist()
    return min(among, key=lambda i: ongoing[i])


@dataclass(eq=False)
class Request:
    """One in the simulation; `told` is called with it when it has ended."""

    asked: Asked
    answer: Answered
    told: Callable[[float], None] = lambda now: None
    replica: int = -1


class Replica:
    """A joining batch and the rows that wait for it, as `serving.engine.Engine`, on simulated forwards."""

    def __init__(self, steps: StepTimes, slots: int) -> None:
        self._backend = TimedBackend(steps)
        self._batch = JoiningBatch(self._backend, slots)
        self._waiting: Any = Queue()  # of jobs and rows; a request is both
        self._running: dict[Handle, Request] = {}
        self.stepping = False
        self.busy: list[tuple[float, float]] = []  # from, to: steps
        self.counts = Counts(0, 0, 0)
        self.host = 0.0  # processor seconds that the batch took around its forwards, on this machine

    @property
    def ongoing(self) -> int:
        """Requests that wait or run."""
        return len(self._waiting) + len(self._running)

    def add(self, request: Request) -> None:
        """It waits for a place."""
        self._waiting.add(request, [request])

    def step(self, now: float) -> tuple[float, list[tuple[Request, list[int], bool]]] | None:
        """Rows join, then one step: when it ends, and the blocks that it then has finished; None with nothing to do."""
        while self._batch.free and (waiting := self._waiting.next(self._running.values())):
            request = waiting[1]
            handle = self._batch.add(request.asked.prompt, DecodeSettings(**request.asked.options))
            self._running[handle] = request
        if not len(self._batch):
            return None
        before, rows, blocks = self._backend.spent, len(self._batch), []
        self.host -= time.thread_time() - self._backend.real
        found = self._batch.step()
        self.host += time.thread_time() - self._backend.real
        for done in found:
            if done.error:
                raise done.error
            blocks.append((self._running[done.handle], done.token_ids, done.finish_reason is not None))
        over = now + self._backend.spent - before
        self.busy.append((now, over))
        self.counts = Counts(self.counts.steps + 1, self.counts.rows + rows,
                             self.counts.tokens + sum(len(tokens) for _, tokens, _ in blocks))
        return over, blocks

    def ended(self, request: Request) -> None:
        """Its last block was given."""
        self._running = {handle: one for handle, one in self._running.items() if one is not request}


@dataclass
class Fleet:
    """Replicas behind one rule, and a clock that begins at 0. Seeded: the same twice is the same."""

    steps: StepTimes
    replicas: int
    slots: int
    route: Route = "least"
    most_ongoing: int | None = None  # of a replica; a request beyond is refused
    seed: int = 0
    refused: int = 0
    now: float = 0.0
    _events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.members = [Replica(self.steps, self.slots) for _ in range(self.replicas)]
        self._rng, self._order = np.random.default_rng(self.seed), itertools.count()

    def at(self, when: float, action: Callable[[], None]) -> None:
        """Do something when the clock is there; what was asked for first is first."""
        heapq.heappush(self._events, (when, next(self._order), action))

    def send(self, request: Request) -> None:
        """A request arrives now."""
        request.answer.sent = self.now
        place = choose([member.ongoing for member in self.members], self.route, self._rng)
        member = self.members[place]
        if self.most_ongoing is not None and member.ongoing >= self.most_ongoing:
            self.refused += 1
            return
        request.replica = place
        member.add(request)
        if not member.stepping:
            self._begin(member)

    def run(self, over: Callable[[], bool] = lambda: False) -> None:
        """Until nothing is left to happen, or it is over."""
        while self._events and not over():
            self.now, _, action = heapq.heappop(self._events)
            action()

    def _begin(self, member: Replica) -> None:
        step = member.step(self.now)
        member.stepping = step is not None
        if step is not None:
            self.at(step[0], lambda: self._end(member, step[1]))

    def _end(self, member: Replica, blocks: Sequence[tuple[Request, list[int], bool]]) -> None:
        """Blocks arrive, and the next step begins; who has an answer may then ask again."""
        for request, tokens, last in blocks:
            request.answer.blocks.append((self.now, tokens))
            request.answer.ended = last
            if last:
                member.ended(request)
        self._begin(member)
        for request, _, last in blocks:
            if last:
                request.told(self.now)
