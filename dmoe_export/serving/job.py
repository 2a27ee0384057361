"""A request while it is answered: its rows, what they have finished, and how it ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from ..decoding.answer import Block
from ..decoding.telemetry import Statistics
from ..decoding.watch import StepSeen

Ending = Literal["timeout", "cancelled", "disconnected"]


@dataclass(frozen=True)
class Piece:
    """A finished block of one choice; the choice's last has a finish_reason and its statistics."""

    choice: int
    token_ids: list[int]
    text: str | None  # None without a tokenizer
    finish_reason: str | None = None
    statistics: Statistics | None = None


@dataclass(eq=False)
class Row:
    """One answer that is decoded; `choices` all get it, and the first is the index of its random numbers."""

    request: Any  # of Generator.request
    choices: list[int]
    prefix_tokens: int = 0  # of its prompt, taken from the prefix store; once it has ended


@dataclass(eq=False)
class Job:
    """One request of a client. The engine's thread writes, the event loop reads: `put` is the bridge between them.

    What waits for a reader is bounded by the answer: blocks of at most the server's most new tokens.
    """

    key: tuple[int, str]  # owner and id
    rows: list[Row]
    timeout: float  # seconds from now
    seen: Callable[[Any], object] | None = None  # given each StepSeen in the engine's thread; what it gives is sent
    entered: float = field(default_factory=time.monotonic)
    began: float | None = None  # when its first row joined
    first: float | None = None  # when its first block was finished
    over: float | None = None
    ending: Ending | None = None  # why it was asked to end early
    left: int = 0  # rows that have not ended
    statistics: list[Statistics] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._loop, self._queue = asyncio.get_running_loop(), asyncio.Queue[Any]()
        self.left = len(self.rows)

    @property
    def deadline(self) -> float:
        """On the clock of time.monotonic."""
        return self.entered + self.timeout

    @property
    def watch(self) -> Callable[[StepSeen], None] | None:
        """For its rows in the batch; None where nobody looks."""
        seen = self.seen
        return None if seen is None else lambda step: self.put(seen(step))

    def put(self, item: object) -> None:
        """From the engine's thread: a Piece, what `seen` gave, an Exception, or None for the end."""
        with suppress(RuntimeError):  # the loop has ended, and so has the reader
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)

    def post(self, row: Row, block: Block) -> None:
        """A row's finished block, to all its choices."""
        if self.first is None:
            self.first = time.monotonic()
        reason: str | None = block.finish_reason
        if reason == "cancelled" and self.ending == "timeout":
            reason = "timeout"
        if reason:
            row.prefix_tokens = block.stats.prefix_tokens
        for choice in row.choices:
            self.put(Piece(choice, block.token_ids, block.text, reason, block.stats if reason else None))

    async def items(self, every: float | None = None) -> AsyncIterator[Any]:
        """What was put, in order, to its end; raises what it ended with. None each `every` seconds without anything."""
        while True:
            try:
                item = await asyncio.wait_for(self._queue.get(), every)
            except asyncio.TimeoutError:
                yield None
                continue
            if item is None:
                return
            if isinstance(item, Exception):
                raise item
            yield item
