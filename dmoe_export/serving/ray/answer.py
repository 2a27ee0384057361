"""An answer that outlives its replica: what is lost with one is asked of another, and what was sent is skipped."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..asked import Ask, Course, Ending, Piece
from ..errors import FAILED, ApiError, where
from ..job import until_end
from .replay import DiffersError, Replay
from .wire import MOST_REPEATS, FullError, LostError, NobodyError, Stream, attempt_key

if TYPE_CHECKING:
    from .remote import RemoteModel

GRACE = 10.0  # seconds after a request's time is over in which its replica may still say so
_ELSEWHERE = ("model_failed", "shutting_down")  # refusals of a replica, not of the request
_LOG = logging.getLogger("dmoe_export.serving")


class RemoteAnswer:
    """An `Answer` that outlives its replica."""

    def __init__(self, ask: Ask, model: RemoteModel) -> None:
        self.ask, self.course = ask, Course()
        self.taken = False  # by the replica of this attempt
        self._told = False  # that it is cancelled
        self._model, self._replay = model, Replay()
        self._entered, self._lost = time.monotonic(), 0
        self._queue = asyncio.Queue[Any]()
        self._first = asyncio.get_running_loop().create_future()
        self._task = asyncio.ensure_future(self._run())

    async def begin(self) -> None:
        """Wait until a replica has taken the request; raises ApiError where none does, or it is refused."""
        try:
            await asyncio.shield(self._first)
        except asyncio.CancelledError:
            self._task.cancel()
            raise

    async def items(self, every: float | None = None) -> AsyncIterator[Any]:
        """As `Answer.items`."""
        try:
            async for item in until_end(self._queue, every):
                yield item
        finally:
            self._task.cancel()  # of an ended one nothing

    def cancel(self, why: Ending) -> None:
        """End it: by its replica, so that what is finished is told, or at once where nobody reads or none has it."""
        if why == "disconnected":
            self._task.cancel()
        elif self.taken:
            self._told = True
            self._model.tell_to_end(self.ask.key, why)
        elif not self._task.done():
            self._end(self._cancelled())
            self._task.cancel()

    # The task.

    async def _run(self) -> None:
        end: ApiError | None = None
        try:
            while True:
                try:
                    await self._attempt()
                    break
                except LostError as error:
                    self._lost += 1
                    _LOG.warning("request %s: a replica of %s was lost: %s", self.ask.key[1], self._model.name, error)
                    if self._told:
                        raise self._cancelled() from None
                    if self._lost > MOST_REPEATS:
                        raise self._gone(f"so were the {MOST_REPEATS} that it was given to next") from None
        except ApiError as error:
            end = error
        except DiffersError:
            end = self._gone("another one answers otherwise")
        except Exception as error:
            _LOG.error("request %s failed: %s at %s", self.ask.key[1], type(error).__name__, where(error))
            end = ApiError(500, FAILED, code="internal_error")
        except asyncio.CancelledError:
            self._queue.put_nowait(None)
            raise
        finally:
            self.taken = False
            self._model.left(self, time.monotonic() - self._entered)
        self._end(end)

    def _end(self, error: ApiError | None) -> None:
        if self._first.done():
            self._queue.put_nowait(error)
        elif error is not None:
            self._first.set_exception(error)
        else:
            self._first.set_result(None)
            self._queue.put_nowait(None)

    async def _attempt(self) -> None:
        self.taken = False
        self._replay.again()
        left = self._entered + self.ask.timeout - time.monotonic()
        stream = self._model.wire.ask(replace(self.ask, key=attempt_key(self.ask.key, self._lost),
                                              timeout=max(left, 0.001)))
        whole = False
        try:
            while not whole:
                item = await self._next(stream)
                whole = isinstance(item, ApiError) or self._is_last(item)
            if isinstance(item, ApiError):
                raise LostError(item.detail) if item.code in _ELSEWHERE else item
        except FullError:
            raise self._gone("as many requests wait for another as may") if self._lost else self._model.full() from None
        except NobodyError:
            raise self._model.nobody() from None
        finally:
            if not whole:
                stream.cancel()

    async def _next(self, stream: Stream) -> Any:
        """The next item; the time of a request that is over is told to its replica, which then has `GRACE`."""
        step, end = asyncio.ensure_future(stream.next()), self._entered + self.ask.timeout
        try:
            await asyncio.wait({step}, timeout=max(end - time.monotonic(), 0))
            if not step.done() and self.taken:
                self._model.tell_to_end(self.ask.key, "timeout")
                await asyncio.wait({step}, timeout=max(end + GRACE - time.monotonic(), 0))
            if step.done():
                return step.result()
            if self.taken or self._lost:
                raise self._gone(f"none ended it within {self.ask.timeout:g} seconds")
            raise ApiError(503, f"No replica of model {self._model.name} took the request within {self.ask.timeout:g} "
                           "seconds.", code="timeout", headers={"retry-after": "5"})
        finally:
            step.cancel()

    def _is_last(self, item: Any) -> bool:
        """Take an item."""
        now = time.monotonic() - self._entered
        if isinstance(item, Course):
            waited = self.course.queue_seconds or 0.0
            if self.taken:  # the last item
                self.course.statistics, self.course.cached_tokens = item.statistics, item.cached_tokens
                if item.queue_seconds is not None:
                    self.course.queue_seconds = waited + item.queue_seconds
                return True
            self.taken, self.course.prompt_tokens, self.course.queue_seconds = True, item.prompt_tokens, now
            if not self._first.done():
                self._first.set_result(None)
        elif isinstance(item, Piece):
            if self._replay.is_new(item):
                if self.course.first_block_seconds is None:
                    self.course.first_block_seconds = now
                self._queue.put_nowait(item)
        elif self._replay.caught_up:
            self._queue.put_nowait(item)
        return False

    def _cancelled(self) -> ApiError:
        return ApiError(409, "The request was cancelled while no replica had it.", code="cancelled")

    def _gone(self, why: str) -> ApiError:
        return ApiError(503, f"A replica of model {self._model.name} was lost while it answered, and {why}; ask again.",
                        code="replica_lost", headers={"retry-after": "1"})
