"""Hostile requests to the server, in process: each beside a good one, which must be answered as ever."""

from __future__ import annotations

import asyncio
import io
import json
import random
from contextlib import redirect_stderr
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dmoe_export.decoding.settings import OPTIONS
from dmoe_export.errors import RequestError
from dmoe_export.generator import Generator
from dmoe_export.serving.app import application
from dmoe_export.serving.engine import Engine
from dmoe_export.serving.house import House
from dmoe_export.serving.metrics import Metrics
from dmoe_export.serving.schema import HARMLESS, NOT_HERE, OTHERS
from dmoe_export.serving.structured import FIELDS

from .. import mutate
from ..case import IDS, PROMPT, Base, Case

KEY = "the-key"
GENERATING = ("/v1/chat/completions", "/v1/completions", "/v1/chat/denoising")
_PLACES = ("/", "/v1/models", "/v1/models/sample", "/v1/requests/x", "/health/live", "/metrics", "/page/x.js", "/no",
           "/v1/models/\x00", "//", "/v1/chat/completions/", "/page/../app.py", "/openapi.json", "/v1/models/é")
_NAMES = [*OPTIONS, *HARMLESS, *NOT_HERE, *OTHERS, *FIELDS, "template", "infill", "n", "stream", "stream_options",
          "max_tokens", "model", "nope"]
_CODES = {"timeout"}  # of 5xx that a client may be to blame for


def requests(rng: random.Random, base: Base, folder: Path) -> Case:
    """One request: odd fields, a damaged body, odd headers, or a client that leaves."""
    path = rng.choice(GENERATING) if rng.random() < 0.85 else rng.choice(_PLACES)
    method = ("POST" if path in GENERATING else "GET") if rng.random() < 0.95 else rng.choice(
        ["GET", "POST", "DELETE", "HEAD", "OPTIONS", "PUT", "nope"])
    body, done = _body(rng, path)
    headers, odd = _headers(rng, body)
    leaves = rng.random() < 0.1
    pieces = [body] if rng.random() < 0.8 else [body[i:i + 7] for i in range(0, min(len(body), 7000), 7)] or [b""]
    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
             "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": headers,
             "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000)}
    words = f"{method} {path[:40]!r}: {done}; {odd}{'; leaves' if leaves else ''}"
    keys = [KEY] if rng.random() < 0.2 else []

    def call() -> Any:
        return asyncio.run(_both(base, scope, pieces, leaves, keys, rng.random() < 0.5))

    return Case(words, [], call)


def _body(rng: random.Random, path: str) -> tuple[bytes, str]:
    whole: dict[str, Any] = {"model": "sample", "max_tokens": 4}
    whole |= {"prompt": PROMPT} if path == "/v1/completions" else {"messages": [
        {"role": "system", "content": "x"}, {"role": "user", "content": [{"type": "text", "text": PROMPT}]}]}
    if rng.random() < 0.3:
        whole |= {rng.choice(("template", "infill")): ["x ", {"gap": 2}, [5], {"gap": [2, 2]}, "."]}
        if "infill" in whole and rng.random() < 0.9:
            whole.pop("prompt" if path == "/v1/completions" else "messages")
    for _ in range(rng.choice([0, 1, 1, 2, 3])):
        name = rng.choice(_NAMES)
        whole[name] = mutate.value(rng, OPTIONS[name].default if name in OPTIONS else None)
    done = f"{whole!r:.100}"
    if rng.random() < 0.5:
        whole, what = mutate.tree(rng, whole)
        done += f"; {what}"
    data = json.dumps(whole).encode()
    if rng.random() < 0.2:
        data, what = mutate.text(rng, data)
        done += f"; {what}"
    return data, done


def _headers(rng: random.Random, body: bytes) -> tuple[list[tuple[bytes, bytes]], str]:
    """As h11 lets them through: no control characters, lengths that are numbers."""
    named = {"host": "localhost", "content-type": "application/json", "authorization": f"Bearer {KEY}"}
    odd = ""
    if rng.random() < 0.25:
        name = rng.choice([*named, "x-request-id", "content-length", "content-encoding", "origin", "accept"])
        value = rng.choice(["", "x" * 65, "é", "../..", "Bearer", "Bearer é", "text/plain", "[::1", "[::1]:1", "a:b:c",
                            "application/json; charset=utf-7", "application/jsonp", "gzip", "null", "127.0.0.1.x"])
        named[name] = value if name != "content-length" else rng.choice(["0", "9" * 30, "1"])
        odd = f"{name}: {value[:30]}"
    return [(name.encode(), value.encode("latin-1")) for name, value in named.items()], odd


async def _both(base: Base, scope: dict[str, Any], pieces: list[bytes], leaves: bool, keys: list[str],
                first: bool) -> list[Any]:
    metrics, said = Metrics(), io.StringIO()
    engine = Engine("sample", Generator.open(base.bundle, threads=1), 2, 8, metrics, "1M")
    app = application(House({"sample": engine}, metrics, 16, 5.0), keys, 100_000)
    good = json.dumps({"model": "sample", "prompt": [int(i) for i in IDS.split(",")], "max_tokens": 4}).encode()
    post = {"method": "POST", "path": "/v1/completions", "raw_path": b"/v1/completions", "headers": [
        (b"host", b"localhost"), (b"content-type", b"application/json"), (b"authorization", f"Bearer {KEY}".encode())]}
    both = [_ask(app, dict(scope), pieces, leaves), _ask(app, scope | post, [good], False)]
    try:
        with redirect_stderr(said):
            answers = await asyncio.gather(*(both if first else both[::-1]))
            for _ in range(100):
                await asyncio.sleep(0.01 * bool(engine.busy))
        hostile, neighbour = answers if first else answers[::-1]
        assert await engine.ready() and not engine.busy and not engine.jobs, "a request is left in the engine"
    finally:
        engine.close()
    lines = [json.loads(line) for line in said.getvalue().splitlines()]  # anything else on stderr is a defect
    assert len(lines) <= 2 and PROMPT not in said.getvalue(), said.getvalue()[:500]
    assert json.loads(neighbour[1])["choices"][0]["token_ids"] == base.tokens, f"the neighbour got {neighbour!r:.300}"
    if not leaves:
        _check(scope["method"], str(base.bundle), *hostile)
    return [SimpleNamespace(token_ids=base.tokens)]


async def _ask(app: Any, scope: dict[str, Any], pieces: list[bytes], leaves: bool) -> tuple[int, bytes]:
    """Status and body; a client that `leaves` does so when it has sent its body."""
    coming, begun, got = list(pieces), list[int](), list[bytes]()

    async def receive() -> dict[str, Any]:
        if coming:
            return {"type": "http.request", "body": coming.pop(0), "more_body": bool(coming)}
        if not leaves:
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            begun.append(message["status"])
            assert all(value.isascii() for header in message["headers"] for value in header), message
        else:
            got.append(message.get("body", b""))

    await app(scope, receive, send)
    assert len(begun) == 1 or leaves, f"{len(begun)} answers"
    return (begun or [0])[0], b"".join(got)


def _check(method: str, folder: str, status: int, body: bytes) -> None:
    """Raises RequestError where it was refused as it should, AssertionError for what is neither that nor an answer."""
    text = body.decode()
    if status == 200:
        events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
        told = [json.loads(one) for one in events if one != "[DONE]"]
        wrong = [one["error"] for one in told if "error" in one and one["error"]["code"] not in _CODES]
        assert not wrong, f"an error in a stream: {wrong!r:.300}"
        return
    if method == "HEAD" and not body:
        raise RequestError("No body, as it was a HEAD.")
    error = json.loads(text)["error"]
    assert error.keys() == {"message", "type", "param", "code"} and folder not in text, text[:300]
    assert 400 <= status < 500 or error["code"] in _CODES, f"{status}: {text[:300]}"
    assert len(error["message"]) < 1000 and error["message"].isprintable(), text[:300]
    raise RequestError(error["message"])
