"""What an expert budget costs where it changes nothing: steps under a budget that holds all experts, and without one.

Both backends are open at once and take turns on the same forwards, so that a machine that slows down slows both; then
once more beside a thread that computes in Python all the while, as a server's may.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import numpy as np
from pydantic import Field

from ..bundle.reader import Bundle
from ..description import Frozen
from ..runtime.backend import ForwardInputs
from ..runtime.cpu.backend import OnnxRuntimeBackend
from ..runtime.cpu.resident import open_resident
from ..runtime.residency.budget import machine_memory, plan_budget
from .record import Spread

TOKENS, CACHED = 32, 256


class Price(Frozen):
    """Of one routing."""

    routing: str
    beside_python: bool = Field(description="while another thread computes in Python")
    unique_experts: float = Field(description="a layer")
    without_seconds: Spread
    under_seconds: Spread
    ratio: float = Field(description="median over rounds of under a budget of everything / without one")


def price(bundle: Bundle, routings: dict[str, dict[str, Any]], rounds: int,
          threads: int | None = None) -> list[Price] | None:
    """None where the experts are more than three quarters of the memory. `routings`: options of each by name."""
    d, moe = bundle.manifest.model, bundle.manifest.model.experts
    if bundle.manifest.bytes_per_expert * moe.num_experts * len(d.moe_layers) > machine_memory() * 3 // 4:
        return None
    budget = plan_budget(bundle.manifest, "100%")
    assert budget is not None
    backends: list[Any] = [OnnxRuntimeBackend(bundle, threads), open_resident(bundle, budget, "auto", threads)]
    random = np.random.default_rng(0)
    known, new = (random.integers(0, d.vocab_size, (1, count)) for count in (CACHED, TOKENS))
    caches = [backend.new_cache(1) for backend in backends]
    before = ForwardInputs(known, np.arange(CACHED)[None], np.full((1, 1), -1), {}, want_keys_values=True)
    for backend, cache in zip(backends, caches, strict=True):
        cache.commit(before, backend.forward(before, cache), np.ones((1, CACHED), bool))
    prices = []
    for routing, options in routings.items():
        settings = {name.removeprefix("coreset_"): value for name, value in options.items()}  # as forwards have them
        inputs = ForwardInputs(new, CACHED + np.arange(TOKENS)[None], np.zeros((1, 1), np.int64), settings)
        for beside in (False, True):
            seconds: list[list[float]] = [[], []]
            with _computing(beside):
                for _ in range(rounds + 2):
                    for backend, cache, times in zip(backends, caches, seconds, strict=True):
                        start = time.perf_counter()
                        outputs = backend.forward(inputs, cache)
                        times.append(time.perf_counter() - start)
            without, under = (times[2:] for times in seconds)  # the first two of each warm up
            prices.append(Price(
                routing=routing, beside_python=beside, without_seconds=Spread.of(without),
                under_seconds=Spread.of(under),
                unique_experts=float(np.mean([len(np.unique(ids[ids >= 0])) for ids in outputs.expert_ids])),
                ratio=median(u / w for u, w in zip(under, without, strict=True))))
    backends[1].close()
    return prices


@contextmanager
def _computing(wanted: bool) -> Iterator[None]:
    """A thread that computes in Python, if wanted."""
    end = threading.Event()

    def work() -> None:
        while not end.is_set():
            sum(range(200))

    thread = threading.Thread(target=work, daemon=True)
    if wanted:
        thread.start()
    try:
        yield
    finally:
        end.set()
        if wanted:
            thread.join()
