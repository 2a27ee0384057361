"""One structured line per request, and its count: what was asked, how it ended, what it took; no text of prompts."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .asked import Course
from .errors import FAILED, ApiError, where
from .gate import path_of
from .metrics import Metrics

_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_OUTCOMES = {401: "unauthorised", 413: "too_large", 429: "queue_full", 503: "unavailable"}
QUIET = ("/health/", "/metrics", "/page/")  # asked every few seconds by machines, or files: counted nowhere


@dataclass
class Record:
    """Of one request; routes fill it, the outermost layer writes it. Lengths in tokens, times in seconds."""

    id: str
    path: str
    owner: int = -1  # number of the API key
    model: str = ""
    stream: bool = False
    outcome: str | None = None
    status: int = 0
    choices: int = 0
    course: Course | None = None
    prompt: Any = None  # only where the server was told to log prompts
    entered: float = field(default_factory=time.monotonic)

    def line(self) -> dict[str, Any]:
        """For JSON."""
        now = time.monotonic()
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "request": self.id, "path": self.path,
            "status": self.status, "outcome": self.outcome, "seconds": round(now - self.entered, 4)}
        if self.owner >= 0:
            line["key"] = self.owner
        if self.model:
            line |= {"model": self.model, "stream": self.stream, "choices": self.choices,
                     "prompt_tokens": self.course.prompt_tokens if self.course else 0}
        if course := self.course:
            stats = course.statistics
            forwards = sum(one.forwards for one in stats)
            new = sum(one.new_tokens - one.given_tokens for one in stats)
            line |= {"new_tokens": new, "forwards": forwards,
                     "prefix_tokens": sum(one.prefix_tokens for one in stats),
                     "tokens_per_forward": round(new / forwards, 3) if forwards else 0.0,
                     "queue_seconds": _rounded(course.queue_seconds),
                     "first_block_seconds": _rounded(course.first_block_seconds)}
        if self.prompt is not None:
            line["prompt"] = self.prompt
        return line


def _rounded(seconds: float | None) -> float | None:
    return seconds and round(seconds, 4)


class Recorded:
    """The outermost layer: an id for every request, its line on standard error, its count, and no error unanswered."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand on, and write what came of it."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        asked = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        known = bool(_ID.fullmatch(asked))
        record = Record(asked if known else uuid.uuid4().hex, path_of(scope)[:200])
        scope.setdefault("state", {})["record"] = record

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = record.id
            await send(message)

        try:
            if asked and not known:
                raise ApiError(400, "x-request-id must be 1 to 64 letters, digits, dots, dashes or underscores.")
            await self._app(scope, receive, named)
        except Exception as error:
            await self._fail(error, record, scope, receive, named)
        finally:
            self._write(record)

    async def _fail(self, error: Exception, record: Record, scope: Scope, receive: Receive, send: Send) -> None:
        if not isinstance(error, ApiError):
            logging.getLogger("dmoe_export.serving").error("request %s failed: %s at %s", record.id,
                                                         type(error).__name__, where(error))
            error = ApiError(500, FAILED, code="internal_error")
        if not record.status:
            await error.response(scope, receive, send)

    def _write(self, record: Record) -> None:
        if record.path.startswith(QUIET):
            return
        fault = "error" if record.status >= 500 else "refused" if record.status >= 400 else "answered"
        record.outcome = record.outcome or _OUTCOMES.get(record.status, fault)
        self._metrics.requests.labels(record.model, record.outcome).inc()
        with suppress(OSError):  # nobody reads standard error any more
            print(json.dumps(record.line()), file=sys.stderr, flush=True)
