"""Prefill + block steps against the cache equal one full forward; rows and padding do not influence each other."""

from __future__ import annotations

import numpy as np
import pytest
from bundles import eager

from dmoe_export.runtime.backend import ForwardInputs
from dmoe_export.runtime.cpu.backend import OnnxRuntimeBackend

LENGTH, N = 96, 32


@pytest.fixture(scope="module", params=["eager", "onnxruntime"])
def backend(request, golden, golden_bundle):
    return eager(golden / "model") if request.param == "eager" else OnnxRuntimeBackend(golden_bundle)


def _forward(backend, cache, ids, positions):
    rows, tokens = ids.shape
    every = np.broadcast_to(np.arange(tokens), (rows, tokens)).copy()
    inputs = ForwardInputs(ids, positions, every, {}, want_logits=True, want_keys_values=True)
    return inputs, backend.forward(inputs, cache)


def _ids(rows, seed=0):
    return np.random.default_rng(seed).integers(0, 509, (rows, LENGTH))


def _full(backend, ids):
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape).copy()
    return _forward(backend, backend.new_cache(len(ids)), ids, positions)[1]


@pytest.mark.parametrize("prefill", [0, 32, 64])
def test_cached_steps_equal_full_forward(backend, prefill):
    ids = _ids(2)
    want = _full(backend, ids).logits
    cache = backend.new_cache(2)
    start = 0
    for stop in sorted({prefill, 32, 64, 96} - {0}):
        if stop < prefill:
            continue
        part = ids[:, start:stop]
        positions = np.broadcast_to(np.arange(start, stop), part.shape).copy()
        inputs, out = _forward(backend, cache, part, positions)
        np.testing.assert_allclose(out.logits, want[:, start:stop], atol=1e-4)
        cache.commit(inputs, out, np.ones(part.shape, bool))
        start = stop


def test_rows_do_not_influence_each_other(backend):
    ids = _ids(3)
    together = _full(backend, ids)
    for i in range(3):
        alone = _full(backend, ids[i:i + 1])
        np.testing.assert_allclose(together.logits[i], alone.logits[0], atol=1e-4)
        np.testing.assert_array_equal(np.sort(together.expert_ids[:, i]), np.sort(alone.expert_ids[:, 0]))


def test_padding_changes_nothing(backend):
    ids = _ids(1)
    want = _full(backend, ids)
    rng = np.random.default_rng(3)
    places = np.sort(rng.choice(LENGTH + 37, LENGTH, replace=False))  # padding anywhere: before, between, after
    padded = rng.integers(0, 509, (1, LENGTH + 37))
    positions = np.full(padded.shape, -1)
    padded[0, places], positions[0, places] = ids[0], np.arange(LENGTH)
    _, out = _forward(backend, backend.new_cache(1), padded, positions)
    np.testing.assert_allclose(out.logits[:, places], want.logits, atol=1e-4)
    np.testing.assert_array_equal(np.sort(out.expert_ids[:, :, places]), np.sort(want.expert_ids))
    assert (np.delete(out.expert_ids, places, axis=2) == -1).all()
    assert np.isfinite(out.logits).all()


def test_stale_cache_rows_are_not_seen(backend):
    """Rows at position −1 may hold anything."""
    ids = _ids(1)
    cache = backend.new_cache(1)
    first = np.arange(N)[None]
    inputs, out = _forward(backend, cache, ids[:, :N], first)
    cache.commit(inputs, out, np.ones((1, N), bool))
    want = _forward(backend, cache, ids[:, N:2 * N], first + N)[1].logits
    for part in (*cache.keys, *cache.values):
        part[:, :, N:] = 7.0
    got = _forward(backend, cache, ids[:, N:2 * N], first + N)[1].logits
    np.testing.assert_array_equal(got, want)


def test_ragged_cache(backend):
    """Two rows with different numbers of committed blocks decode in one forward."""
    ids = _ids(2)
    cache = backend.new_cache(2)
    positions = np.full((2, 64), -1)
    positions[0, :32], positions[1] = np.arange(32), np.arange(64)
    inputs, out = _forward(backend, cache, ids[:, :64], positions)
    cache.commit(inputs, out, positions >= 0)
    step = np.stack([ids[0, 32:64], ids[1, 64:96]])
    where = np.stack([np.arange(32, 64), np.arange(64, 96)])
    got = _forward(backend, cache, step, where)[1].logits
    np.testing.assert_allclose(got[0], _full(backend, ids[:1, :64]).logits[0, 32:], atol=1e-4)
    np.testing.assert_allclose(got[1], _full(backend, ids[1:]).logits[0, 64:], atol=1e-4)
