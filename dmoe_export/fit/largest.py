"""Whether a prediction fits, and the largest batch, context and expert budget that do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import Field

from ..bundle.manifest import Manifest
from ..description import Frozen
from ..words import count, size
from .cpu import expert_bytes
from .predict import predict
from .prediction import Prediction

MOST_BATCH = 1024  # as `serve` takes
MEBIBYTE = 1 << 20


class Verdict(Frozen):
    """What a prediction comes to where so much memory is."""

    prediction: Prediction
    memory: int = Field(description="bytes of host memory it may use")
    gpu_memory: int | None = Field(description="bytes of a GPU; null = not known")
    fits: bool | None = Field(description="null where that is not known: a GPU whose memory nobody told")
    largest_batch: int | None = Field(description="rows of this context that fit; null = not even one, or not known")
    largest_context: int | None = Field(description="tokens of this many rows that fit; null likewise")
    largest_expert_budget: int | None = Field(description="bytes with which this batch fits, where it does not "
                                              "without; null = it does, or none is enough")
    sentence: str


def fits(prediction: Prediction, memory: int, gpu_memory: int | None) -> bool | None:
    """None where the GPU's memory decides and is not known."""
    if prediction.host_bytes > memory:
        return False
    if not prediction.device_bytes:
        return True
    return None if gpu_memory is None else prediction.device_bytes <= gpu_memory


def verdict_of(manifest: Manifest, memory: int, gpu_memory: int | None, **asked: Any) -> Verdict:
    """Of the keywords of `predict`. Raises as it."""
    found = predict(manifest, **asked)
    good, unbudgeted = fits(found, memory, gpu_memory), found.expert_budget is None

    def fit(**other: Any) -> bool:
        return bool(fits(predict(manifest, **asked | other), memory, gpu_memory))

    known = good is not None
    batch = most(1, MOST_BATCH, lambda rows: fit(max_batch=rows)) if known else None
    context = _context(manifest, lambda tokens: fit(max_context=tokens)) if known else None
    budget = budget_that_fits(manifest, memory, gpu_memory, **asked) if good is False and unbudgeted else None
    return Verdict(prediction=found, memory=memory, gpu_memory=gpu_memory, fits=good, largest_batch=batch,
                   largest_context=context, largest_expert_budget=budget,
                   sentence=_sentence(found, good, memory, gpu_memory, batch, context, budget))


def budget_that_fits(manifest: Manifest, memory: int, gpu_memory: int | None, **asked: Any) -> int | None:
    """The largest expert budget, in whole MiB, with which it fits; None where none does, or the backend keeps none."""
    moe, each = manifest.model.moe, manifest.bytes_per_expert
    if moe is None or asked.get("backend") == "onnxruntime-cuda":
        return None
    if asked.get("backend") == "tensorrt" and not any(engine.expert_pools for engine in manifest.denoiser_engines):
        return None
    least, everything = -(-moe.experts_per_token * each // MEBIBYTE), expert_bytes(manifest) // MEBIBYTE

    def fit(budget: int) -> bool:
        found = predict(manifest, **asked | {"expert_budget": budget * MEBIBYTE, "machine_bytes": 1 << 62})
        return bool(fits(found, memory, gpu_memory))

    found = most(max(1, least), everything, fit)
    return None if found is None else found * MEBIBYTE


def most(least: int, largest: int, good: Callable[[int], bool]) -> int | None:
    """The largest number that is good, where all below a good one are; None: not even the least."""
    if largest < least or not good(least):
        return None
    low, high = least, largest + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if good(middle) else (low, middle)
    return low


def _context(manifest: Manifest, good: Callable[[int], bool]) -> int | None:
    """In whole blocks, or all positions."""
    block, positions = manifest.step_tokens, manifest.model.max_positions
    if good(positions):
        return positions
    blocks = most(1, positions // block, lambda number: good(number * block))
    return None if blocks is None else blocks * block


def _sentence(found: Prediction, good: bool | None, memory: int, gpu_memory: int | None, batch: int | None,
              context: int | None, budget: int | None) -> str:
    needs = f"needs {size(found.host_bytes)} of {size(memory)}"
    if found.device_bytes:
        needs += f" and {size(found.device_bytes)} of a GPU" + (f"'s {size(gpu_memory)}" if gpu_memory else "")
    if good is None:
        return f"{needs}; say --gpu-memory to know whether that fits"
    if good:
        return (f"fits: {needs}; so do {count(batch or 1, 'row')} of {found.max_context:,} tokens, or "
                f"{count(found.max_batch, 'row')} of {context or found.max_context:,}")
    if budget:
        return f"does not fit: {needs}; --expert-budget {budget // MEBIBYTE}M does"
    return f"does not fit: {needs}" + (f"; --max-batch {batch} does" if batch else "") + (
        f"; --max-context {context} does" if context else "")
