"""The application: routes behind the gate, inside the layer that records every request."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI
from starlette.types import ASGIApp

from .. import __version__
from . import denoising, errors, page
from .gate import OPEN, Gate
from .house import House
from .record import Recorded
from .routes import router


def application(house: House, keys: Sequence[str] = (), most_body: int = 2 << 20,
                hosts: Sequence[str] = ()) -> ASGIApp:
    """`most_body` in bytes; `keys`, `hosts`: see `Gate`. No page with outside resources: /openapi.json is all."""
    app = FastAPI(title="dmoe-export", version=__version__, docs_url=None, redoc_url=None,
                  redirect_slashes=False)  # a redirect would name this server as a proxy's clients do not
    app.state.house = house
    errors.install(app)
    for part in (router, denoising.router, page.router):
        app.include_router(part)
    return Recorded(Gate(app, keys, most_body, hosts, (*OPEN, *page.PATHS)), house.metrics)
