"""The server's process: its socket, its protocol's deadlines, and how it ends."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import RequestError
from .house import House

HEADER_SECONDS = 10.0  # from a connection, or its first byte of a next request, to the end of the headers
IDLE_SECONDS = 30  # that a connection is kept between requests
DEAD_SECONDS = 30  # without an acknowledgement: the other side is gone, or does not read
_LAST_SECONDS = 2.0  # for answers of cancelled requests to be written


def listen(host: str, port: int) -> socket.socket:
    """A bound socket whose connections notice a peer that is gone; raises RequestError where it cannot be had."""
    made: socket.socket | None = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM,
                                                                flags=socket.AI_PASSIVE)[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3),
                            ("TCP_USER_TIMEOUT", DEAD_SECONDS * 1000)):
            if hasattr(socket, name):  # accepted sockets inherit them
                made.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        made.bind(address)
    except OSError as error:
        if made:
            made.close()
        raise _taken(host, port, error) from None
    return made


def _taken(host: str, port: int, error: OSError) -> RequestError:
    return RequestError(f"Port {port} of {host} cannot be listened on: {error.strerror}; choose others with --host and "
                        "--port.")


def address(bound: socket.socket) -> str:
    """As a URL."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Protocol(H11Protocol):
    """uvicorn's own, which waits without end for headers that do not come."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """The first headers are waited for."""
        super().connection_made(transport)
        self._watch_headers()

    def data_received(self, data: bytes) -> None:
        """Headers may have ended, or begun."""
        super().data_received(data)
        self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for."""
        super().connection_lost(exc)
        self._forget()

    def _watch_headers(self) -> None:
        waiting = self.cycle is None or (self.cycle.response_complete and self.timeout_keep_alive_task is None)
        if not waiting:
            self._forget()
        elif self._late is None:
            self._late = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def _forget(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


class _Server(uvicorn.Server):
    """Signals are this module's: a drained server ends with 0."""

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """None."""
        yield


def run(app: ASGIApp, house: House, bound: socket.socket, drain_seconds: float, began: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT, then let requests end for so many seconds and cancel the rest.

    A second signal cancels them at once. `began`: called once the server listens.
    """
    asyncio.run(_serve(app, house, bound, drain_seconds, began))


async def _serve(app: ASGIApp, house: House, bound: socket.socket, drain_seconds: float,
                 began: Callable[[], None]) -> None:
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # records are this package's
    server = _Server(uvicorn.Config(
        app, http=_Protocol, ws="none", lifespan="off", log_config=None, log_level="critical", access_log=False,
        server_header=False, timeout_keep_alive=IDLE_SECONDS, timeout_graceful_shutdown=int(_LAST_SECONDS) + 1))
    signals, loop = asyncio.Queue[int](), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.put_nowait, number)
    serving = loop.create_task(server.serve(sockets=[bound]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    if server.started:
        began()
    asked = loop.create_task(signals.get())
    await asyncio.wait({serving, asked}, return_when=asyncio.FIRST_COMPLETED)
    for model in house.models.values():
        model.drain()
    await _emptied(house, drain_seconds, signals)
    for model in house.models.values():
        model.end_all()
    await _emptied(house, _LAST_SECONDS, asyncio.Queue())
    server.should_exit = True
    try:
        await serving
    except OSError as error:  # bound, but another server of this moment listened first
        host, port = bound.getsockname()[:2]
        raise _taken(host, port, error) from None


async def _emptied(house: House, seconds: float, signals: asyncio.Queue[int]) -> None:
    """Wait until no request is in progress, for so long, or until another signal comes."""
    end = time.monotonic() + seconds
    while house.busy and time.monotonic() < end and signals.empty():
        await asyncio.sleep(0.02)
