"""A request while an engine answers it: its rows, what they have finished, and how it ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from ..decoding.answer import Block
from ..decoding.watch import StepSeen
from ..text.pieces import Pieces
from .asked import Ask, Course, Ending, Piece
from .seen import state
from .shown import Shown, given_tokens


@dataclass(eq=False)
class Row:
    """One answer that is decoded; `choices` all get it, and the first is the index of its random numbers."""

    request: Any  # of Generator.request
    choices: list[int]
    shown: Shown | None = None  # where a template gives places
    prefix_tokens: int = 0  # of its prompt, taken from the prefix store; once it has ended


@dataclass(eq=False)
class Job:
    """An `Answer` of this process. The engine's thread writes, the event loop reads: `put` is the bridge between them.

    What waits for a reader is bounded by the answer: blocks of at most the server's most new tokens.
    """

    ask: Ask
    rows: list[Row]
    pieces: Pieces | None = None  # texts of provisional states, where they are wanted
    gone: Callable[[], bool] | None = None  # asked before each forward whether its client has left
    entered: float = field(default_factory=time.monotonic)
    over: float | None = None
    ending: Ending | None = None  # why it was asked to end early
    course: Course = field(default_factory=Course)

    def __post_init__(self) -> None:
        self._loop, self._queue = asyncio.get_running_loop(), asyncio.Queue[Any]()
        self.left = len(self.rows)  # rows that have not ended
        self.course.prompt_tokens = sum({id(row.request): given_tokens(row.request) for row in self.rows}.values())

    @property
    def deadline(self) -> float:
        """On the clock of time.monotonic."""
        return self.entered + self.ask.timeout

    @property
    def watch(self) -> Callable[[StepSeen], None] | None:
        """For its rows in the batch; None where nobody looks."""
        return self.put if self.ask.watched else None

    def cancel(self, why: Ending) -> None:
        """End it at the next step; of an ended one nothing."""
        if self.over is None and self.ending is None:
            self.ending = why

    def began(self) -> float:
        """Its first row has joined the batch; the seconds that it waited."""
        self.course.queue_seconds = time.monotonic() - self.entered
        return self.course.queue_seconds

    def put(self, item: object) -> None:
        """From the engine's thread: a Piece, a StepSeen, an Exception, or None for the end."""
        with suppress(RuntimeError):  # the loop has ended, and so has the reader
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)

    def post(self, row: Row, block: Block) -> None:
        """A row's finished block, to all its choices."""
        if self.course.first_block_seconds is None:
            self.course.first_block_seconds = time.monotonic() - self.entered
        reason: str | None = block.finish_reason
        if reason == "cancelled" and self.ending == "timeout":
            reason = "timeout"
        if reason:
            row.prefix_tokens = block.stats.prefix_tokens
            self.course.cached_tokens = sum({id(one.request): one.prefix_tokens for one in self.rows}.values())
        told = Piece(row.choices[0], block.token_ids, block.text, reason, block.stats if reason else None,
                     block.probabilities)
        if row.shown:
            told = row.shown.of(told, block)
        for choice in row.choices:
            self.put(replace(told, choice=choice))

    async def items(self, every: float | None = None) -> AsyncIterator[Any]:
        """What was put, in order, to its end; raises what it ended with. None each `every` seconds without anything."""
        async for item in until_end(self._queue, every):
            yield state(item, self.pieces) if isinstance(item, StepSeen) and self.pieces else item


async def until_end(queue: asyncio.Queue[Any], every: float | None) -> AsyncIterator[Any]:
    """Items of a queue up to None; raises an item that is an Exception. None each `every` seconds without anything."""
    while True:
        try:
            item = await asyncio.wait_for(queue.get(), every)
        except asyncio.TimeoutError:
            yield None
            continue
        if item is None:
            return
        if isinstance(item, Exception):
            raise item
        yield item
