"""Before the application: keys, hosts and sizes, looked at while nothing of the body was read."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import RequestError
from ..guards.regular_file import read_regular
from .errors import ApiError

OPEN = ("/health/live", "/health/ready")  # paths that never need a key; the page's files are added by the application
BODY_SECONDS = 30.0  # for a whole body
_LINGER = 1.0  # seconds in which the rest of a refused body is thrown away, so that the client reads why
_MOST_KEY_FILE = 1 << 20


def path_of(scope: Scope) -> str:
    """The path inside this application, which may be mounted under a prefix (`root_path`)."""
    path, prefix = str(scope["path"]), str(scope.get("root_path", "")).rstrip("/")
    inside = bool(prefix) and path.startswith(prefix + "/")
    return path[len(prefix):] if inside else "/" if path == prefix else path


def read_keys(file: Path | None) -> list[str]:
    """API keys, one per line; empty lines and those that begin with # are none."""
    if file is None:
        return []
    try:
        lines = read_regular(file, _MOST_KEY_FILE).decode("ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it has bytes that are not ASCII"
        raise RequestError(f"API key file {file} cannot be read: {reason}; give a text file with a key per line.") \
            from None
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise RequestError(f"API key file {file} has no key; write one per line, or leave --api-key-file out.")
    return keys


def _digest(key: bytes) -> bytes:
    """Of one length for every key, so that comparing takes the same time for all."""
    return hashlib.sha256(key).digest()


class Gate:
    """Refuses at once: a wrong key (401), a body too large (413) or too slow (408), a host that is none of ours (400).

    Without keys, the Host header must be an address, localhost or one of `hosts`: a page of another site whose name
    was pointed here must not ask the server through a browser.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], most_body: int, hosts: Sequence[str],
                 open_paths: Sequence[str] = OPEN) -> None:
        self._app, self._most, self._hosts, self._open = app, most_body, {h.lower() for h in hosts}, open_paths
        self._keys = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or hand on."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = dict(scope["headers"])
        try:
            self._check_key(scope, headers)
            self._check_host(headers)
            self._check_length(headers)
        except ApiError as error:
            return await _refuse(error, scope, receive, send)
        await self._app(scope, self._bounded(receive), send)

    def _check_key(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        if not self._keys or path_of(scope) in self._open:
            return
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        given, owner = _digest(key.strip()), -1
        for number, one in enumerate(self._keys):  # all of them, whichever fits
            if hmac.compare_digest(given, one):
                owner = number
        if scheme.lower() != b"bearer" or owner < 0:
            raise ApiError(401, "The API key is missing or not one of this server's; send it as Authorization: Bearer "
                           "KEY.", code="invalid_api_key", headers={"www-authenticate": "Bearer"})
        scope["state"]["owner"] = owner

    def _check_host(self, headers: dict[bytes, bytes]) -> None:
        name = headers.get(b"host", b"").decode("latin-1").lower()
        name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
        if self._keys or name in ("", "localhost") or name in self._hosts:
            return
        with suppress(ValueError):
            ipaddress.ip_address(name)
            return
        raise ApiError(400, f"Host {name[:100]} is not this server; if it is, start it with --allowed-host "
                       f"{name[:100]}.", code="unknown_host")

    def _check_length(self, headers: dict[bytes, bytes]) -> None:
        if b"transfer-encoding" in headers and b"content-length" in headers:  # a proxy may read the other one
            raise ApiError(400, "The body has both a length and a transfer-encoding; send one.", code="two_lengths")
        if int(headers.get(b"content-length", b"0")) > self._most:  # h11 has seen that it is a number
            raise self._too_large()

    def _too_large(self) -> ApiError:
        return ApiError(413, f"The body is larger than the {self._most} bytes that this server takes.",
                        code="body_too_large", headers={"connection": "close"})

    def _bounded(self, receive: Receive) -> Receive:
        """Counts bytes and time until the body has ended; after it, waits for a disconnect are as they were."""
        taken, ended, end = 0, False, time.monotonic() + BODY_SECONDS

        async def bounded() -> Message:
            nonlocal taken, ended
            if ended:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, end - time.monotonic()))
            except asyncio.TimeoutError:
                raise ApiError(408, f"The body did not arrive within {BODY_SECONDS:.0f} seconds.", code="slow_body",
                               headers={"connection": "close"}) from None
            taken += len(message.get("body", b""))
            ended = not message.get("more_body", False)
            if taken > self._most:
                raise self._too_large()
            return message

        return bounded


async def _refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer, then throw away what still comes for a moment: a closed socket would swallow the answer."""
    response = error.response
    closing = [] if "connection" in response.headers else [(b"connection", b"close")]
    headers = [*response.raw_headers, *closing]
    await send({"type": "http.response.start", "status": error.status_code, "headers": headers})
    await send({"type": "http.response.body", "body": response.body, "more_body": True})
    if error.status_code == 413:
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(_throw_away(receive), _LINGER)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _throw_away(receive: Receive) -> None:
    while (await receive()).get("more_body", False):
        pass
