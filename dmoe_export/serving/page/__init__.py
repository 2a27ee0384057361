"""The page at `/`: a chat that shows denoising. Plain files, served as they lie here; nothing comes from elsewhere."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, HTTPException, Response
from fastapi.responses import FileResponse

_HERE = Path(__file__).parent
_KINDS = {".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8",
          ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}
FILES = {path.name: path for path in sorted(_HERE.iterdir()) if path.suffix in _KINDS}
PATHS = ("/", *(f"/page/{name}" for name in FILES))  # without a key
# Scripts, styles and connections of the own origin alone, and no other page may frame it: it holds an API key.
HEADERS = {"Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
           "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}

router = APIRouter(include_in_schema=False)


@router.head("/")
@router.get("/")
def index() -> Response:
    """The page; it needs no key, and asks for one where the endpoints do."""
    return _file("index.html")


@router.get("/page/{name}")
def file(name: str) -> Response:
    """A file of the page, by its name alone."""
    if name not in FILES:
        raise HTTPException(404)
    return _file(name)


def _file(name: str) -> Response:
    path = FILES[name]
    return FileResponse(path, media_type=_KINDS[path.suffix], headers=HEADERS)
