"""Refusing, before anything is opened, what cannot fit: what is needed, what there is, and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..bundle.manifest import Manifest
from ..bundle.reader import Bundle, read_manifest
from ..errors import RequestError
from ..runtime.cpu.products import Products
from ..runtime.residency.budget import parse_bytes
from ..words import count, size
from .largest import MEBIBYTE, budget_that_fits, most
from .predict import predict
from .prediction import Program
from .room import has_gpu, process_memory

TOLERANCE = 1.1  # predictions are this far off at most, so what needs more is refused
_BLOCKS = 2  # of context, where nobody said how much: the least with a prompt and an answer


def refuse_unfit(bundle: Bundle | Manifest | Path, *, backend: str = "auto", max_batch: int = 1,
                 max_context: int | None = None, memory: str | int | None = None, products: Products = "exact",
                 threads: int | None = None, expert_budget: str | int | None = None,
                 experts_per_layer: int | None = None, prefix_cache: str | int | None = None,
                 program: Program = "serve", name: str = "The bundle") -> None:
    """Raise RequestError where a bundle cannot run in this process's memory, even if predictions are a tenth too high.

    `backend`: as a verb takes it; "auto" is the CPU where no GPU is. What a GPU holds is told when it is opened, so
    other backends are not refused here. `max_context` None: two blocks, as requests may be short. `memory`: what there
    is, such as "8G" (None: `process_memory`). `name`: of a manifest, in the error. The rest as in `predict`, whose
    errors it raises.
    """
    have = process_memory()
    if memory is not None:
        have = parse_bytes(memory, have, "Memory")
    if backend not in ("auto", "onnxruntime") or (backend == "auto" and products == "exact" and has_gpu()):
        return
    called, manifest = _of(bundle, name)
    d, n = manifest.model, manifest.step_tokens
    context = min(max_context or _BLOCKS * n, d.max_positions)
    asked: dict[str, Any] = {
        "max_batch": max_batch, "max_context": context, "products": products, "threads": threads, "program": program,
        "expert_budget": expert_budget, "experts_per_layer": experts_per_layer, "prefix_cache": prefix_cache,
        "kernels": True}  # without them it is more, but how much was never compared
    found = predict(manifest, **asked)
    if found.host_bytes <= TOLERANCE * have:
        return
    raise RequestError(
        f"{called} needs {size(found.host_bytes)} of memory for {count(max_batch, 'answer')} at once of "
        f"{count(context, 'token')}, there are {size(have)}; {_advice(manifest, have, asked)}.")


def _of(bundle: Bundle | Manifest | Path, name: str) -> tuple[str, Manifest]:
    """How it is called, and its manifest."""
    if isinstance(bundle, Bundle):
        return str(bundle.folder), bundle.manifest
    if isinstance(bundle, Manifest):
        return name, bundle
    return str(bundle), read_manifest(bundle)


def _advice(manifest: Manifest, have: int, asked: dict[str, Any]) -> str:
    """The change that keeps most of what was asked for."""
    overrule = "or say what there is with --memory"
    if asked["expert_budget"] is None and asked["experts_per_layer"] is None:
        budget = budget_that_fits(manifest, have, None, **asked)
        if budget:
            return f"give --expert-budget {budget // MEBIBYTE}M, {overrule}"
    batch = most(1, asked["max_batch"] - 1,
                 lambda rows: predict(manifest, **asked | {"max_batch": rows}).host_bytes <= have)
    if batch:
        return f"give --max-batch {batch}, {overrule}"
    return f"use a machine with more, export with a smaller --precision, {overrule}"
