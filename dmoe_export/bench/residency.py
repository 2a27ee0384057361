"""Expert residency compared in one process: budget × refresh interval × routing over the same prompt.

Settings take turns round by round, each opened anew and cold: no expert in memory, and their file out of the page cache
as far as the kernel lets go of it. Budget `off` is the plain backend: the kernel pages as it likes. Peaks are what the
kernel says of this process, not the tier. What keeping books costs by itself is in `residency_price.py`.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from pydantic import Field

from ..bundle.reader import Bundle
from ..description import Frozen
from ..errors import RequestError
from ..generator import Generator
from ..guards.numerals import real
from ..runtime.cpu.backend import OnnxRuntimeBackend
from ..runtime.cpu.mapped_memory import FileIdentity, file_backed_bytes
from ..runtime.cpu.resident import expert_file, open_resident
from ..runtime.residency.backend import ResidentBackend, parse_interval
from ..runtime.residency.budget import plan_budget
from ..text.prompts import Prompt
from .residency_price import Price, price

_SAMPLE_EVERY = 0.02  # seconds


@dataclass(frozen=True)
class Setting:
    """One combination; `options` are the routing settings of `Generator.generate`."""

    routing: str
    budget: str
    interval: str
    options: dict[str, Any] = field(compare=False)


class ResidencyResult(Frozen):
    """What one setting did; totals and peak are of the round of median time, a hit is one (layer, forward, expert)."""

    routing: str
    budget: str
    interval: str
    budget_bytes: int | None
    residents_per_layer: int | None
    last_interval: int | None = Field(description="in force at the end; 0 = never")
    tokens: int
    forwards: int = Field(description="model forwards (NFE)")
    executed_forwards: int | None = Field(None, description="forwards that ran; null in results of before they were "
                                          "counted")
    unique_experts: float
    seconds: list[float] = Field(description="of each round")
    tokens_per_second: float
    hit_rate: float | None
    promotions: int | None
    brought_bytes: int | None
    missed_bytes: int | None
    dropped_bytes: int | None
    read_bytes: int = Field(description="from the disk, by this process")
    peak_expert_bytes: int = Field(description="under a budget by its books, which equal the page tables; else sampled")
    change_per_step: float | None
    bring_cost: float | None = Field(description="C_io, seconds per expert, as timed so far")
    miss_cost: float | None = Field(description="C_slow, seconds per expert, as timed so far")
    same_tokens: bool = Field(description="as the first setting of this routing")


class ResidencyBench(Frozen):
    """All settings of one run."""

    prompt_tokens: int
    max_new_tokens: int
    steps: int
    rounds: int
    expert_bytes: int
    results: list[ResidencyResult]
    price: list[Price] | None = Field(description="null: not timed, or all experts are too much for this machine")


def settings(budgets: Sequence[str], intervals: Sequence[str], routings: Sequence[str],
             num_experts: int) -> list[Setting]:
    """Every combination; budget `off` has no interval. A routing is `token` or `top_p`, or `top_p:0.4`."""
    chosen = []
    for routing, budget in itertools.product(routings, budgets):
        options = _routing(routing, num_experts)
        for interval in intervals if budget != "off" else ["–"]:
            chosen.append(Setting(routing, budget, interval, options))
    return chosen


def _routing(text: str, num_experts: int) -> dict[str, Any]:
    """Token routing is block routing whose coreset is everybody."""
    if text == "token":
        return {"min_experts": num_experts}
    if text == "top_p":
        return {}
    name, _, p = text.partition(":")
    try:
        if name == "top_p":
            return {"coreset_top_p": real(p)}
    except ValueError:
        pass
    raise RequestError(f"Routing {text!r} is not known; give token, top_p or top_p:0.6.")


def run(bundle: Bundle, prompt: Prompt, chosen: Sequence[Setting], rounds: int, *, max_new_tokens: int, steps: int,
        turns: int, threads: int | None = None,
        advance: Callable[[str], None] = lambda what: None) -> ResidencyBench:
    """Measure all settings; `advance` hears of every finished one. Raises as `Generator.open` and `generate` do.

    `turns`: steps of which the price of a budget is taken; 0 = not at all.
    """
    manifest = bundle.manifest
    for setting in chosen:  # refuse before anything takes long
        plan_budget(manifest, None if setting.budget == "off" else setting.budget)
    measured: dict[Setting, list[tuple[float, dict[str, Any]]]] = {setting: [] for setting in chosen}
    first: dict[str, list[int]] = {}
    length = 0
    for _ in range(rounds):
        for setting in chosen:
            _forget(bundle)
            budget = plan_budget(manifest, None if setting.budget == "off" else setting.budget)
            backend: Any = (open_resident(bundle, budget, parse_interval(setting.interval), threads) if budget
                            else OnnxRuntimeBackend(bundle, threads))
            seconds, row, tokens, length = _measure(bundle, backend, prompt, setting,
                                                    {"max_new_tokens": max_new_tokens, "steps": steps})
            if budget:
                backend.close()
            del backend  # and with it the last mapping of the experts, or their pages would stay cached
            first.setdefault(setting.routing, tokens)
            measured[setting].append((seconds, row | {"same_tokens": tokens == first[setting.routing]}))
            advance(f"{setting.routing} {setting.budget} {setting.interval}")
    return ResidencyBench(
        prompt_tokens=length, max_new_tokens=max_new_tokens, steps=steps, rounds=rounds,
        expert_bytes=manifest.bytes_per_expert * manifest.model.experts.num_experts * len(manifest.model.moe_layers),
        results=[_result(setting, measured[setting]) for setting in chosen],
        price=price(bundle, {s.routing: s.options for s in chosen}, turns, threads) if turns else None)


def _result(setting: Setting, rounds: list[tuple[float, dict[str, Any]]]) -> ResidencyResult:
    times = [seconds for seconds, _ in rounds]
    _, row = min(rounds, key=lambda r: abs(r[0] - median(times)))
    return ResidencyResult(routing=setting.routing, budget=setting.budget, interval=setting.interval, seconds=times,
                           tokens_per_second=row["tokens"] / median(times),
                           **row | {"same_tokens": all(r["same_tokens"] for _, r in rounds)})


def _measure(bundle: Bundle, backend: Any, prompt: Prompt, setting: Setting,
             common: dict[str, Any]) -> tuple[float, dict[str, Any], list[int], int]:
    FileIdentity.of(bundle.folder / f"{bundle.manifest.denoiser.file}.data").populate()
    generator, read = Generator(bundle, backend), _read_bytes()
    with _peak(FileIdentity.of(expert_file(bundle))) as peak:
        start = time.perf_counter()
        answer = generator.generate([prompt], eos_id=-1, **{"temperature": 0.0} | common, **setting.options)[0]
        seconds = time.perf_counter() - start
    done = backend.statistics() if isinstance(backend, ResidentBackend) else None
    names = ("budget_bytes", "residents_per_layer", "last_interval", "hit_rate", "promotions", "brought_bytes",
             "missed_bytes", "dropped_bytes", "change_per_step", "bring_cost", "miss_cost")
    row = {name: getattr(done, name) if done else None for name in names}
    row |= {"tokens": answer.stats.new_tokens, "forwards": answer.stats.forwards,
            "executed_forwards": answer.stats.executed_forwards,
            "unique_experts": answer.stats.unique_experts, "read_bytes": _read_bytes() - read,
            "peak_expert_bytes": done.peak_bytes if done else peak[0]}
    return seconds, row, answer.token_ids, answer.stats.prompt_tokens


def _forget(bundle: Bundle) -> None:
    """Ask the kernel to drop the expert file from its page cache."""
    handle = os.open(expert_file(bundle), os.O_RDONLY)
    try:
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def _read_bytes() -> int:
    with open("/proc/self/io", encoding="ascii") as lines:  # noqa: PTH123
        return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


@contextmanager
def _peak(file: FileIdentity) -> Iterator[list[int]]:
    """Samples the file-backed memory of this process; the one element is the most beyond what was no expert at first:
    dense weights are to be in memory before.

    Not a walk through the page tables: while pages move it adds up what was never there at once.
    """
    other, most, stop = file_backed_bytes() - file.resident_bytes(), [0], threading.Event()

    def look() -> None:
        while not stop.wait(_SAMPLE_EVERY):
            most[0] = max(most[0], file_backed_bytes() - other)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        stop.set()
        thread.join()
        most[0] = max(most[0], file_backed_bytes() - other)
