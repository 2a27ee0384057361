"""From a path to an open bundle and what runs it: the keywords of `Generator.open`, checked before anything is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .bundle.hub import resolve_bundle
from .bundle.reader import Bundle, Verify, open_bundle
from .decoding.defaults import Defaults
from .decoding.option import check_kind
from .errors import RequestError
from .runtime.backend import Backend
from .runtime.choose import BACKENDS, BackendName, open_backend, open_under_budget
from .runtime.cpu.products import Products, check_products
from .runtime.cpu.session import MOST_THREADS
from .runtime.residency.backend import parse_interval
from .runtime.residency.budget import plan_budget


def open_model(path: str | Path, *, backend: BackendName, threads: int | None, expert_budget: str | int | None,
               experts_per_layer: int | None, expert_refresh_interval: str | int, cpu_products: Products,
               preset: str | None, verify: Verify, expect_sha256: str | None, trusted_key: str | Path | None,
               progress: Callable[[int], None] | None) -> tuple[Bundle, Backend, str]:
    """The bundle, its backend, and why it is this one; keywords and errors as of `Generator.open`."""
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise RequestError(f"Backend {backend!r} is not known; known: {', '.join(BACKENDS)}.")
    if threads is not None:
        check_kind("threads", threads, int)
        if not 1 <= threads <= MOST_THREADS:
            raise RequestError(f"threads is {threads}, it must be between 1 and {MOST_THREADS}.")
    check_kind("path", path, Path)
    for name, value, kind in (("trusted_key", trusted_key, Path), ("expect_sha256", expect_sha256, str)):
        if value is not None:
            check_kind(name, value, kind)
    products = check_products(cpu_products)
    interval = parse_interval(expert_refresh_interval)
    bundle = open_bundle(resolve_bundle(path), verify, progress, expect_sha256=expect_sha256, trusted_key=trusted_key)
    Defaults(bundle, preset)  # what is wrong with them is known before a backend takes memory
    budget = plan_budget(bundle.manifest, expert_budget, experts_per_layer)
    if budget is None:
        return bundle, *open_backend(bundle, backend, threads, products)
    return bundle, *open_under_budget(bundle, budget, interval, backend, threads, products)
