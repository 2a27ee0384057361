"""The ASGI application inside Serve: the same as `dmoe-export serve`, below whatever prefix its application has."""

from __future__ import annotations

from pathlib import Path

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..app import application
from ..gate import read_keys
from ..house import House
from ..metrics import Metrics
from .remote import RemoteModel
from .settings import Settings
from .wire import Wire


class Mounted:
    """Takes Serve's events of an application's life, and leaves x-request-id to Serve, which writes it itself."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand on."""
        if scope["type"] == "lifespan":
            return await _live(receive, send)

        async def without_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [one for one in message["headers"] if one[0] != b"x-request-id"]}
            await send(message)

        await self._app(scope, receive, without_id)


async def _live(receive: Receive, send: Send) -> None:
    """Nothing is begun or ended here."""
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return


def mounted(settings: Settings, name: str, wire: Wire, metrics: Metrics) -> Mounted:
    """The application over replicas; raises RequestError for a file of keys that cannot be read."""
    keys = read_keys(Path(settings.api_key_file) if settings.api_key_file else None)
    house = House({name: RemoteModel(name, wire)}, metrics, settings.max_new_tokens, settings.timeout,
                  settings.log_prompts)
    return Mounted(application(house, keys, settings.max_body, settings.allowed_hosts))
