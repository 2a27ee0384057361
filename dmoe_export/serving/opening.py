"""An engine from a bundle's folder, for servers without a command line, and how many rows it has in all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..bundle.hub import resolve_bundle
from ..generator import Generator
from .engine import Engine
from .metrics import Metrics

USUAL_SLOTS = 8  # rows at once, where the backend has no limit of its own
USUAL_WAITING = 64  # requests beyond them


def open_engine(name: str, bundle: str | Path, *, slots: int | None = None, max_waiting: int = USUAL_WAITING,
                prefix_cache: str | None = None, metrics: Metrics | None = None, **opening: Any) -> Engine:
    """`bundle`: a folder or a hub id; `opening`: keywords of `Generator.open`, whose errors it raises."""
    generator = Generator.open(resolve_bundle(bundle), **opening)
    try:
        return Engine(name, generator, slots or slots_of(generator), max_waiting, metrics or Metrics(), prefix_cache)
    except BaseException:
        generator.close()
        raise


def slots_of(generator: Generator) -> int:
    """What an engine was built for, else a number that 2 cores and a small GPU take."""
    limits = generator.backend.limits
    return (limits and limits.max_batch) or USUAL_SLOTS
