"""The server's application in this process, on a free port, and a client of few lines."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from typing import Any

import uvicorn

from dmoe_export.bundle.reader import Bundle
from dmoe_export.generator import Generator
from dmoe_export.serving.app import application
from dmoe_export.serving.engine import Engine
from dmoe_export.serving.house import House
from dmoe_export.serving.metrics import Metrics
from dmoe_export.serving.process import address, listen

CHAT = "/v1/chat/denoising"


@contextmanager
def house_of(bundle: Bundle) -> Iterator[House]:
    """One model called `sample`, two rows at once."""
    generator, metrics = Generator.open(bundle.folder, threads=1, verify="sizes"), Metrics()
    house = House({"sample": Engine("sample", generator, 2, 4, metrics)}, metrics, 256, 60.0)
    try:
        yield house
    finally:
        for engine in house.models.values():
            engine.close()


@dataclass(frozen=True)
class Answer:
    """Of HTTP."""

    status: int
    headers: Message
    text: str

    def json(self) -> Any:
        return json.loads(self.text)

    def events(self) -> list[tuple[str, dict[str, Any]]]:
        """Names and values of server-sent events."""
        events = []
        for part in self.text.split("\n\n"):
            fields = dict(line.split(": ", 1) for line in part.splitlines() if not line.startswith(":"))
            if fields:
                events.append((fields["event"], json.loads(fields["data"])))
        return events


def ask(url: str, body: dict[str, Any] | None = None) -> Answer:
    """GET, or POST of a body, whatever the status."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"} if data else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return Answer(response.status, response.headers, response.read().decode())
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, error.headers, error.read().decode())


@contextmanager
def served(house: House, keys: Sequence[str] = ()) -> Iterator[str]:
    """The address of the application on a free port of this machine."""
    bound = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(application(house, keys), log_level="error", lifespan="off"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([bound])), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield address(bound)
    finally:
        server.should_exit = True
        thread.join(10)
        bound.close()
