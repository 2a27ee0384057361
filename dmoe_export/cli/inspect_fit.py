"""`dmoe-export inspect --fit`: how much memory a bundle takes to run, by backend, and what fits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click
from rich.table import Table

from ..bundle.manifest import Manifest
from ..errors import RequestError
from ..fit import room
from ..fit.largest import Verdict, verdict_of
from ..fit.prediction import BACKENDS
from ..runtime.cpu.products import PRODUCTS
from ..runtime.residency.budget import machine_memory, parse_bytes
from ..words import count
from .help import option
from .output import console, say

F = TypeVar("F", bound=Callable[..., Any])
USUAL_CONTEXT = 4096
_OPTIONS = (
    option("--fit", is_flag=True, group="memory",
           help="Predict the memory of running it, by backend, and say what fits"),
    option("--memory", metavar="SIZE", group="memory", shown="what this machine gives a process",
           help="Host memory that may be used, such as 8G"),
    option("--gpu-memory", metavar="SIZE", group="memory", shown="what is free on this machine's",
           help="Memory of a GPU, such as 24G"),
    option("--max-batch", type=click.IntRange(1, 1024), default=8, group="memory", help="Answers at once"),
    option("--max-context", type=click.IntRange(1), metavar="N", group="memory",
           shown=f"{USUAL_CONTEXT}, or the model's positions", help="Tokens of prompt and answer together"),
    option("--prefix-cache", metavar="SIZE", group="memory", shown="none is kept",
           help="Memory for prompts that begin alike, such as 512M"))
_NAMES = ("memory", "gpu_memory", "max_context", "prefix_cache")


def fit_options(command: F) -> F:
    """All of them; the verb hands its keywords to `verdicts`."""
    for one in reversed(_OPTIONS):
        command = one(command)
    return command


def verdicts(manifest: Manifest, *, fit: bool, memory: str | None, gpu_memory: str | None, max_batch: int,
             max_context: int | None, prefix_cache: str | None, expert_budget: str | None) -> list[Verdict]:
    """Of every backend that may run the bundle; none without `fit`. Raises RequestError as `predict`."""
    if not fit:
        given = [name for name, value in zip(_NAMES, (memory, gpu_memory, max_context, prefix_cache), strict=True)
                 if value is not None]
        if given:
            raise RequestError(f"--{given[0].replace('_', '-')} says what --fit is to predict with; give --fit, too.")
        return []
    host = room.process_memory() if memory is None else parse_bytes(memory, machine_memory(), "Memory")
    device = room.gpu_memory() if gpu_memory is None else parse_bytes(gpu_memory, 0, "GPU memory")
    asked: dict[str, Any] = {"max_batch": max_batch, "expert_budget": expert_budget, "prefix_cache": prefix_cache,
                             "max_context": max_context or min(USUAL_CONTEXT, manifest.model.max_positions)}
    left_out = cannot_run(manifest, expert_budget)
    products = PRODUCTS if "onnxruntime" not in left_out else ()
    found = [verdict_of(manifest, host, device, backend="onnxruntime", products=one, **asked) for one in products]
    return found + [verdict_of(manifest, host, device, backend=backend, **asked) for backend in BACKENDS[1:]
                    if backend not in left_out]


def cannot_run(manifest: Manifest, expert_budget: str | None) -> dict[str, str]:
    """Backends without a prediction, and why."""
    found = {"onnxruntime-cuda": "keeps no expert budget"} if expert_budget else {}
    if manifest.only_on_cpus:
        found |= dict.fromkeys(BACKENDS[1:], f"cannot run {manifest.precision_in_words}, which CPUs alone read")
    if manifest.precision == "bf16":
        found["onnxruntime"] = "computes nothing in bfloat16"
    return found


def show(found: list[Verdict], left_out: dict[str, str]) -> None:
    """A table with a column for every backend, and the verdicts as sentences; `left_out`: of `cannot_run`."""
    first = found[0].prediction
    table = Table("part", "place", *(_called(verdict) for verdict in found),
                  title=f"Bytes of {count(first.max_batch, 'answer')} at once, {first.max_context:,} tokens each, in "
                        f"{first.precision}")
    bytes_of = [{(part.name, part.place): part.bytes for part in verdict.prediction.parts} for verdict in found]
    for name, place in dict.fromkeys(key for parts in bytes_of for key in parts):
        table.add_row(name, place, *(f"{parts.get((name, place), 0):,}" for parts in bytes_of))
    rows = {"in all on the host": "host_bytes", "in all on the GPU": "device_bytes",
            "of these one answer": "bytes_per_row", "of the cache one token": "cache_bytes_per_token"}
    for words, field in rows.items():
        table.add_row(words, "", *(f"{getattr(verdict.prediction, field):,}" for verdict in found))
    for column in table.columns[2:]:
        column.justify = "right"
    console().print(table)
    for verdict in found:
        mark = " (never compared with a GPU)" if verdict.prediction.device_bytes else ""
        say(f"{_called(verdict)} {verdict.sentence}{mark}.")
    for backend, why in left_out.items():
        say(f"{backend} {why}.")


def _called(verdict: Verdict) -> str:
    told = verdict.prediction
    return told.backend + (f", {told.products}" if told.backend == "onnxruntime" else "")
