"""The cache on the device holds exactly what the cache in host memory holds, whatever is done to both."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from fake_cudart import HostDevice
from hypothesis import given, settings
from hypothesis import strategies as st

from dmoe_export.errors import RequestError
from dmoe_export.runtime.backend import ForwardInputs, ForwardOutputs
from dmoe_export.runtime.cache import HostCache
from dmoe_export.runtime.gpu.cache import DeviceCache, Geometry, Slab
from dmoe_export.runtime.gpu.memory import Pool

LAYERS = 2


class Pair:
    """Both caches, fed the same."""

    def __init__(self, rows, heads=3, head_dim=4, dtype=np.float16, capacity=None):
        self.device = HostDevice()
        self.pool, self.stream = Pool(self.device), self.device.stream()
        self.geometry = Geometry(2 * LAYERS, heads, head_dim, np.dtype(dtype).itemsize)
        self.dtype = dtype
        self.host = HostCache(rows, LAYERS, heads, head_dim, np.dtype(dtype))
        self.cache = DeviceCache(rows, self.geometry, self.pool, self.stream, threading.RLock(), capacity)

    def parts(self, slab):
        """A slab's content on the device, as arrays [B, Hkv, length, D]."""
        size = int(np.prod(slab.shape)) * np.dtype(self.dtype).itemsize
        return [self.device.fake.view(slab.part(i), size).view(self.dtype).reshape(slab.shape)
                for i in range(2 * LAYERS)]

    def commit(self, take, rng, spare=0):
        """`spare`: tokens the backend padded the forward with."""
        rows, tokens = take.shape
        slab = Slab(self.pool, self.geometry, rows, tokens + spare)
        new = [rng.random(slab.shape).astype(self.dtype) for _ in range(2 * LAYERS)]
        for part, values in zip(self.parts(slab), new, strict=True):  # as a kernel would write it: in stream order
            self.device.fake.enqueue(self.stream, lambda part=part, values=values: np.copyto(part, values))
        positions = rng.integers(0, 9999, (rows, tokens))
        inputs = ForwardInputs(np.zeros((rows, tokens), np.int64), positions, np.full((rows, 1), -1), {})
        nothing = np.zeros((rows, 1))
        shown = [x[:, :, :tokens] for x in new]
        self.host.commit(inputs, ForwardOutputs(nothing, nothing, nothing, None, (shown[:LAYERS], shown[LAYERS:])),
                         take)
        self.cache.commit(inputs, ForwardOutputs(nothing, nothing, nothing, None, slab), take)

    def keep(self, rows):
        self.host.keep(rows)
        self.cache.keep(rows)

    def clear(self, rows):
        self.host.clear(rows)
        self.cache.clear(rows)

    def check(self):
        self.device.synchronize(self.stream)
        assert (self.cache.positions == self.host.positions).all() and self.cache.stale
        assert (self.cache.lengths == self.host.lengths).all()
        slab = self.cache.slab
        assert slab.shape[2] == self.cache.positions.shape[1]
        for i, (got, want) in enumerate(zip(self.parts(slab), (*self.host.keys, *self.host.values), strict=True)):
            assert slab.part(i) % 256 == 0
            held = (self.host.positions >= 0)[:, None, :, None]  # what a cleared row has left behind may differ
            assert np.array_equal(np.where(held, got, 0), np.where(held, want, 0))
            assert np.isfinite(got).all()  # an unseen key has weight 0, which must not meet a NaN


@pytest.mark.parametrize("shape", [(3, 4, np.float16), (1, 1, np.float32), (4, 128, np.float16)])
def test_runs_and_ragged_rows(shape):
    heads, head_dim, dtype = shape
    rng = np.random.default_rng(0)
    pair = Pair(3, heads, head_dim, dtype)
    pair.check()
    pair.commit(np.array([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [0, 1, 1, 1, 1]], bool), rng)
    pair.check()
    pair.commit(np.array([[0, 1], [1, 1], [0, 0]], bool), rng, spare=3)
    pair.check()


def test_a_run_is_one_copy_and_nothing_waits_for_the_device():
    pair = Pair(2)
    take = np.zeros((2, 40), bool)
    take[0, 3:20], take[1, :5], take[1, 30:] = True, True, True
    waits, copies = (pair.device.fake.calls[name] for name in ("cudaStreamSynchronize", "cudaMemcpy3DAsync"))
    pair.commit(take, np.random.default_rng(0))
    assert pair.device.fake.calls["cudaMemcpy3DAsync"] == copies + 3
    assert pair.device.fake.calls["cudaStreamSynchronize"] == waits
    pair.check()


def test_growth_over_buckets_and_back_to_one_row():
    pair, rng = Pair(2), np.random.default_rng(0)
    for length in (1, 126, 1, 1, 300):
        pair.commit(np.broadcast_to([[True], [False]], (2, length)), rng)
        pair.check()
    assert pair.cache.slab.length == 512
    pair.commit(np.ones((2, 3), bool), rng)
    pair.keep([1])
    pair.check()
    pair.commit(np.ones((1, 9), bool), rng)
    pair.check()


def test_a_cleared_row_starts_anew_and_its_neighbours_stay():
    pair, rng = Pair(3), np.random.default_rng(0)
    pair.commit(np.ones((3, 100), bool), rng)
    kept = pair.host.positions[1, :100].copy()
    copies = pair.device.fake.calls["cudaMemcpy3DAsync"]
    pair.clear([0, 2])
    assert pair.device.fake.calls["cudaMemcpy3DAsync"] == copies  # nothing moves
    pair.check()
    assert (pair.cache.positions[[0, 2]] == -1).all() and (pair.cache.positions[1, :100] == kept).all()
    pair.commit(np.broadcast_to([[True], [False], [True]], (3, 90)), rng)
    pair.check()
    assert pair.cache.lengths.tolist() == [90, 100, 90] and pair.cache.slab.length == 128
    pair.keep([2, 1])
    pair.check()


def test_capacity():
    pair, rng = Pair(1, capacity=200), np.random.default_rng(0)
    pair.commit(np.ones((1, 190), bool), rng)
    assert pair.cache.slab.length == 200
    with pytest.raises(RequestError, match=r"grown to 201 tokens, the engine was built for 200; .*--max-context 201"):
        pair.commit(np.ones((1, 11), bool), rng)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_whatever_is_done(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    rows = data.draw(st.integers(1, 4))
    pair = Pair(rows, data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9)),
                data.draw(st.sampled_from([np.float16, np.float32])))
    for _ in range(data.draw(st.integers(1, 6))):
        if not data.draw(st.integers(0, 4)):
            pair.clear(sorted(data.draw(st.sets(st.integers(0, rows - 1)))))
        elif data.draw(st.integers(0, 3)):
            width = data.draw(st.sampled_from([1, 2, 7, 32, 130]))
            chance = data.draw(st.sampled_from([0.1, 0.5, 0.95, 1.1]))
            pair.commit(rng.random((rows, width)) < chance, rng, data.draw(st.integers(0, 2)))
        else:
            order = data.draw(st.permutations(range(rows)))[:data.draw(st.integers(1, rows))]
            pair.keep(list(order))
            rows = len(order)
        if data.draw(st.booleans()):
            pair.check()
    pair.check()
