"""An engine from a bundle's folder, for servers without a command line, and how many rows it has in all of them."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from ..bundle.hub import resolve_bundle
from ..errors import BundleError
from ..fit.refuse import refuse_unfit
from ..generator import Generator
from .engine import Engine
from .metrics import Metrics

USUAL_SLOTS = 8  # rows at once, where the backend has no limit of its own
USUAL_WAITING = 64  # requests beyond them


def open_engine(name: str, bundle: str | Path, *, slots: int | None = None, max_waiting: int = USUAL_WAITING,
                prefix_cache: str | None = None, metrics: Metrics | None = None, memory: str | None = None,
                **opening: Any) -> Engine:
    """`bundle`: a folder or a hub id; `opening`: keywords of `Generator.open`, whose errors it raises.

    What cannot fit into `memory` (None: what this machine gives a process) is refused before it is opened.
    """
    folder = resolve_bundle(bundle)
    asked = {name: opening[name] for name in ("backend", "threads", "expert_budget", "experts_per_layer")
             if name in opening}
    with suppress(BundleError):  # of what is no bundle, opening it says why, and whether its seal holds
        refuse_unfit(folder, max_batch=slots or 1, prefix_cache=prefix_cache, memory=memory,
                     products=opening.get("cpu_products", "exact"), **asked)
    generator = Generator.open(folder, **opening)
    try:
        return Engine(name, generator, slots or slots_of(generator), max_waiting, metrics or Metrics(), prefix_cache)
    except BaseException:
        generator.close()
        raise


def slots_of(generator: Generator) -> int:
    """What an engine was built for, else a number that 2 cores and a small GPU take."""
    limits = generator.backend.limits
    return (limits and limits.max_batch) or USUAL_SLOTS
