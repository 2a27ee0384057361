"""A bundle with and without an expert budget, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from dmoe_export.bundle.reader import Bundle
from dmoe_export.generator import Generator
from dmoe_export.runtime.backend import ForwardInputs
from dmoe_export.runtime.cpu import library as cpu_ops
from dmoe_export.runtime.cpu.backend import OnnxRuntimeBackend

BUDGETS, INTERVALS = ("100%", "50%", "25%", "10%"), (1, 4, 32)
PAIRS = [("100%", 4), ("50%", 1), ("25%", 32), ("10%", 4)]  # of the grid that test_residency_lossless.py goes through
QUESTIONS = ["what is 2 plus 3?", "write the numbers 4 7 1 9 from last to first.", "what is the capital of france?"]
ANSWER = {"max_new_tokens": 64, "threshold": 1.0, "steps": 12, "eos_id": -1}  # some 33 forwards of each row


def open_generator(bundle: Bundle, threads: int = 1, **options) -> Generator:
    """ONNX Runtime on the CPU; `options` are those of the budget."""
    return Generator.open(bundle.folder, backend="onnxruntime", threads=threads, verify="sizes", **options)


def without_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if our CPU kernels were not built."""
    monkeypatch.setattr(cpu_ops, "INSTALLED", cpu_ops.INSTALLED.with_name("none"))


def same_bits(bundle: Bundle, budget: str, threads: int) -> None:
    """Logits, confidences, keys and values; rows of different lengths, one of nothing but padding; cached rows."""
    plain = OnnxRuntimeBackend(bundle, threads)
    under = open_generator(bundle, threads, expert_budget=budget, expert_refresh_interval=1).backend
    random, vocabulary = np.random.default_rng(0), bundle.manifest.model.vocab_size
    caches = [backend.new_cache(3) for backend in (plain, under)]
    start = 0
    for tokens in (1, 2, 31, 96, 32):
        ids = random.integers(0, min(90, vocabulary), (3, tokens))
        positions = np.tile(np.arange(start, start + tokens), (3, 1))
        positions[1, (tokens + 1) // 2:] = positions[2] = -1
        inputs = ForwardInputs(ids, positions, np.tile(np.arange(tokens), (3, 1)), {}, True, True)
        one, other = (backend.forward(inputs, cache) for backend, cache in zip((plain, under), caches, strict=True))
        for name in ("token_ids", "confidence", "expert_ids", "logits"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        np.testing.assert_array_equal(one.keys_values, other.keys_values)
        for cache, outputs in zip(caches, (one, other), strict=True):
            cache.commit(inputs, outputs, positions >= 0)
        start += tokens
    assert under.statistics().misses > 0
    under.close()
