"""Server-sent events to one reader, who may leave, or stop reading, at any time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

Result = TypeVar("Result")

WRITE_SECONDS = 30.0  # that a reader may take to read what was sent, once the system's buffers are full
QUIET_SECONDS = 15.0  # without an event: a comment follows, so that proxies do not take the silence for an end
COMMENT = b": waiting\n\n"
DONE = b"data: [DONE]\n\n"


def event(data: Any, name: str | None = None) -> bytes:
    """One event with a JSON value."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


async def unless_gone(receive: Receive, work: Awaitable[Result]) -> Result | None:
    """What `work` comes to, or None once the client has left; `work` is cancelled then. The body was read before."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for one in (working, leaving):
            one.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends `events` as they come; `leave` is called when the reader has left before the end, or does not read."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], leave: Callable[[], None]) -> None:
        self._events, self._leave = events, leave
        self.status_code, self.background = 200, None
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Until all is sent, or nobody reads."""
        whole = False
        try:
            whole = await unless_gone(receive, self._talk(send)) or False
        finally:
            if not whole:
                self._leave()

    async def _talk(self, send: Send) -> bool:
        """Whether all was sent."""
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for one in self._events:
                await asyncio.wait_for(send({"type": "http.response.body", "body": one, "more_body": True}),
                                       WRITE_SECONDS)
            await asyncio.wait_for(send({"type": "http.response.body", "body": b"", "more_body": False}),
                                   WRITE_SECONDS)
        except asyncio.TimeoutError:
            return False
        return True
