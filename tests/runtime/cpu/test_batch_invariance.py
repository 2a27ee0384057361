"""A row's logits, keys and values have the same bits alone and in any company, on our CPU kernels.

Company is: other rows, beside it in any slot; rows that are wider (T) or have more cached (S, in buckets, 1 when empty)
or ask for more logits (M), so that this one is padded; one thread or two.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from conftest import SAMPLE
from cpu_ops_helpers import built

from dmoe_export.bundle.reader import Bundle
from dmoe_export.runtime.backend import ForwardInputs
from dmoe_export.runtime.cache import HostCache
from dmoe_export.runtime.cpu import library as cpu_ops
from dmoe_export.runtime.cpu.backend import OnnxRuntimeBackend


class Row(NamedTuple):
    """Tokens with `cached` places before them; indices of the tokens whose logits are wanted."""

    ids: np.ndarray
    cached: int
    keys_values: list[np.ndarray]  # [Hkv, cached, D]; of each layer its keys, then of each its values
    wanted: np.ndarray


class Numbers(NamedTuple):
    """What a forward gives a row."""

    logits: np.ndarray
    confidence: np.ndarray
    expert_ids: np.ndarray
    keys_values: list[np.ndarray]


def drawn(backend: OnnxRuntimeBackend, rng: np.random.Generator, tokens: int, cached: int, wanted: int) -> Row:
    d = backend.description
    parts = [rng.normal(size=(d.num_kv_heads, cached, d.head_dim)) for _ in range(2 * d.num_layers)]
    return Row(rng.integers(0, d.vocab_size, tokens), cached, parts, np.sort(rng.permutation(tokens)[:wanted]))


def forward(backend: OnnxRuntimeBackend, rows: list[Row], slot: int, tokens: int, past: int, wanted: int) -> Numbers:
    """Of the row in `slot`, in a forward of these sizes."""
    shape, cache = (len(rows), tokens), backend.new_cache(len(rows))
    ids, positions = np.zeros(shape, np.int64), np.full(shape, -1)
    logit_rows = np.full((len(rows), wanted), -1)
    _grow(cache, past)
    for i, row in enumerate(rows):
        ids[i, :len(row.ids)] = row.ids
        positions[i, :len(row.ids)] = row.cached + np.arange(len(row.ids))
        logit_rows[i, :len(row.wanted)] = row.wanted
        cache.positions[i, :row.cached] = np.arange(row.cached)
        for array, values in zip((*cache.keys, *cache.values), row.keys_values, strict=True):
            array[i, :, :row.cached] = values
    out = backend.forward(ForwardInputs(ids, positions, logit_rows, {}, want_logits=True, want_keys_values=True), cache)
    row, logits = rows[slot], out.logits
    assert logits is not None
    keys, values = out.keys_values
    return Numbers(logits[slot, :len(row.wanted)], out.confidence[slot, :len(row.wanted)],
                   out.expert_ids[:, slot, :len(row.ids)], [x[slot][:, :len(row.ids)] for x in (*keys, *values)])


def _grow(cache: HostCache, past: int) -> None:
    for arrays in (cache.keys, cache.values):
        for layer, array in enumerate(arrays):
            arrays[layer] = np.zeros((len(array), array.shape[1], past, array.shape[3]), array.dtype)
    cache.positions = np.full((len(cache.positions), past), -1, np.int64)


def assert_invariant(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, seed: int, products: str = "exact") -> None:
    monkeypatch.setattr(cpu_ops, "INSTALLED", built())
    backends = [OnnxRuntimeBackend(bundle, threads, cpu_ops="on", products=products) for threads in (1, 2)]
    rng = np.random.default_rng(seed)
    for tokens, cached, wanted in ((32, 0, 32), (8, 37, 1), (33, 128, 20), (70, 5, 3), (1, 1, 1)):
        row = drawn(backends[0], rng, tokens, cached, wanted)
        bucket = -(-cached // 128) * 128 or 1
        alone = forward(backends[0], [row], 0, tokens, bucket, wanted)
        for others in (0, 1, 4):
            wide, past = tokens + int(rng.integers(0, 90)), bucket + 128 * int(rng.integers(0, 3))
            rows = [drawn(backends[0], rng, int(rng.integers(1, wide + 1)), int(rng.integers(0, past)), 1)
                    for _ in range(others)]
            slot = int(rng.integers(0, others + 1))
            rows.insert(slot, row)
            got = forward(backends[others % 2], rows, slot, wide, past, wanted + int(rng.integers(0, 20)))
            for name, one, other in zip(Numbers._fields, alone, got, strict=True):
                case = f"{name} of {tokens, cached, wanted} in {len(rows), wide, past}"
                np.testing.assert_array_equal(one, other, case)


@pytest.mark.parametrize("geometry", ["llada2", "llada", "dream", "sample", "half"])
def test_families(geometry: str, request: pytest.FixtureRequest, synthetic: Callable[..., Path],
                  exported: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    """Block-causal and full-canvas attention, experts and none, logit shift and biases, float32 and float16."""
    if geometry in ("llada", "dream"):
        bundle = exported(synthetic(f"{geometry}-tiny"))
    else:
        bundle = request.getfixturevalue({"llada2": "tiny_bundle", "sample": "sample_bundle",
                                          "half": "half_sample_bundle"}[geometry])
    assert_invariant(bundle, monkeypatch, 1)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "int8", "int4"])
def test_stored_formats(precision: str, exported: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    assert_invariant(exported(SAMPLE, precision=precision), monkeypatch, 2)


def test_prefill_chunks(sample_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt's last blocks have the same bits, whether those before are new with them or cached, in any pieces."""
    monkeypatch.setattr(cpu_ops, "INSTALLED", built())
    backend = OnnxRuntimeBackend(sample_bundle, 1, cpu_ops="on")
    length, block = 5, sample_bundle.manifest.routing.block_length
    whole = drawn(backend, np.random.default_rng(3), length * block, 0, length * block)
    want = forward(backend, [whole], 0, len(whole.ids), 1, len(whole.ids))
    for cuts in ([1, 4], [2], [1, 2, 3, 4]):
        cached, start = whole.keys_values, 0
        for stop in (*[cut * block for cut in cuts], len(whole.ids)):
            row = Row(whole.ids[start:stop], start, cached, np.arange(stop - start))
            got = forward(backend, [row], 0, stop - start, max(start, 1), stop - start)
            np.testing.assert_array_equal(got.logits, want.logits[start:stop])
            cached = [np.concatenate(pair, axis=1) for pair in zip(cached, got.keys_values, strict=True)]
            start = stop
        for one, other in zip(cached, want.keys_values, strict=True):
            np.testing.assert_array_equal(one, other)
