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
from dmoe_export.runtime.gpu.cache import DeviceCache
from dmoe_export.runtime.gpu.memory import Pool
from dmoe_export.runtime.gpu.slab import Geometry, Slab


class Pair:
    """Both caches, fed the same. `layers`: heads and width of each."""

    def __init__(self, rows, heads=3, head_dim=4, dtype=np.float16, capacity=None, layers=None):
        self.device = HostDevice()
        self.pool, self.stream = Pool(self.device), self.device.stream()
        layers = layers or [(heads, head_dim)] * 2
        self.layers = len(layers)
        self.geometry = Geometry.of_layers(layers, np.dtype(dtype).itemsize)
        self.dtype = dtype
        self.host = HostCache(rows, layers, np.dtype(dtype))
        self.cache = DeviceCache(rows, self.geometry, self.pool, self.stream, threading.RLock(), capacity)

    def parts(self, slab):
        """A slab's content on the device, as arrays [B, Hkv, length, D]."""
        return [self.device.fake.view(slab.part(i), int(np.prod(slab.shape(i))) * np.dtype(self.dtype).itemsize)
                .view(self.dtype).reshape(slab.shape(i)) for i in range(2 * self.layers)]

    def commit(self, take, rng, spare=0, into=None, ordered=False):
        """`spare`: tokens the backend padded the forward with; `into`: its rows; `ordered`: at positions 0, 1, …"""
        rows, tokens = take.shape
        slab = Slab(self.pool, self.geometry, rows, tokens + spare)
        new = [rng.random(slab.shape(i)).astype(self.dtype) for i in range(2 * self.layers)]
        for part, values in zip(self.parts(slab), new, strict=True):  # as a kernel would write it: in stream order
            self.device.fake.enqueue(self.stream, lambda part=part, values=values: np.copyto(part, values))
        positions = np.tile(np.arange(tokens), (rows, 1)) if ordered else rng.integers(0, 9999, (rows, tokens))
        inputs = ForwardInputs(np.zeros((rows, tokens), np.int64), positions, np.full((rows, 1), -1), {})
        nothing = np.zeros((rows, 1))
        shown = [x[:, :, :tokens] for x in new]
        halves = shown[:self.layers], shown[self.layers:]
        self.host.commit(inputs, ForwardOutputs(nothing, nothing, nothing, None, halves), take, into)
        self.cache.commit(inputs, ForwardOutputs(nothing, nothing, nothing, None, slab), take, into)

    def leave(self, row, last):
        if self.cache.lengths[row]:  # what a row has of its own must not outlive it
            for x in (*self.parts(self.cache.slab), *self.host.keys, *self.host.values):
                self.device.synchronize(self.stream)
                x[row, :, :self.cache.lengths[row]] = np.nan
        self.host.leave(row, last)
        self.cache.leave(row, last)

    def clear(self, rows):
        self.host.clear(rows)
        self.cache.clear(rows)

    def check(self):
        assert self.cache.table.stale
        self._same(self.cache.whole, self.host)

    def part(self, rows):
        got = self.cache.part(rows)
        self._same(got, self.host.part(rows))
        return got

    def _same(self, got, want):
        """A part of both, as a forward reads it."""
        self.device.synchronize(self.stream)
        rows = slice(got.first, got.first + got.rows)
        assert (got.table.values[rows] == want.positions).all()
        assert got.shape(0)[2] == got.length == want.positions.shape[1]
        held = (want.positions >= 0)[:, None, :, None]  # what a cleared row has left behind may differ
        for i, (mine, theirs) in enumerate(zip(self.parts(got), (*want.keys, *want.values), strict=True)):
            assert got.part(i) % 256 == 0
            assert np.array_equal(np.where(held, mine, 0), np.where(held, theirs, 0))
            assert np.isfinite(mine).all() and np.isfinite(theirs).all()
        assert got.positions_address % 256 == 0
        assert (self.cache.lengths == self.host.lengths).all()


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


def test_layers_of_two_kinds():
    """A copy per kind; blocks leave and come back; what a forward gave is fetched by layer."""
    pair, rng = Pair(3, layers=[(2, 4), (1, 8), (2, 4)]), np.random.default_rng(0)
    pair.commit(np.ones((1, 60), bool), rng, into=[1], ordered=True)
    before = pair.device.fake.calls["cudaMemcpy3DAsync"]
    block = pair.cache.read(1, 10, 40)
    assert pair.device.fake.calls["cudaMemcpy3DAsync"] == before + 2
    assert block.geometry.slab_bytes(1, 30) == block.bytes
    for cache in (pair.host, pair.cache):
        first = cache.read(1, 0, 30)
        cache.write(0, [first])
        cache.write(2, [first, cache.read(1, 30, 60)])
    pair.check()
    pair.part([0, 2])
    pair.leave(0, 2)
    pair.check()
    assert pair.cache.token_bytes == pair.host.token_bytes == 2 * (8 + 8 + 8) * 2


def test_what_a_forward_gave_is_fetched_layer_by_layer():
    pair, rng = Pair(2, layers=[(2, 4), (1, 8), (3, 2)]), np.random.default_rng(0)
    slab = Slab(pair.pool, pair.geometry, 2, 5)
    given_ = [rng.random(slab.shape(i)).astype(np.float16) for i in range(6)]
    for part, values in zip(pair.parts(slab), given_, strict=True):
        part[:] = values
    nothing = np.zeros((2, 1))
    fetched = pair.cache.fetch(ForwardOutputs(nothing, nothing, nothing, None, slab))
    for raw, values in zip(fetched, given_, strict=True):
        assert np.array_equal(raw.view(np.float16), values)


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
    pair.leave(0, 1)
    pair.check()
    assert pair.cache.slab.length == 128
    pair.commit(np.ones((1, 9), bool), rng, into=[0])
    pair.check()
    pair.leave(0, 0)
    pair.check()
    assert pair.cache.slab.length == 1


def test_blocks_are_read_and_written_by_the_device():
    """Out of one row, after which that row changes; into others, over a bucket and past the capacity."""
    pair, rng = Pair(3, heads=3, head_dim=4, capacity=300), np.random.default_rng(0)
    pair.commit(np.ones((1, 120), bool), rng, into=[1], ordered=True)
    waits = pair.device.fake.calls["cudaStreamSynchronize"]
    blocks = [[cache.read(1, start, start + 30) for start in (0, 30, 60, 90)] for cache in (pair.host, pair.cache)]
    for cache, mine in zip((pair.host, pair.cache), blocks, strict=True):
        cache.clear([1])
        cache.write(0, mine)
        cache.write(2, mine[:1])
        cache.write(2, mine[1:3])
    assert pair.device.fake.calls["cudaStreamSynchronize"] == waits
    pair.check()
    pair.leave(0, 2)
    pair.commit(np.ones((1, 50), bool), rng, into=[0])
    pair.check()
    assert pair.cache.token_bytes == pair.host.token_bytes == 2 * 2 * 3 * 4 * 2
    with pytest.raises(RequestError, match="grown to 330 tokens, the engine was built for 300"):
        pair.cache.write(1, blocks[1] * 2 + blocks[1][:3])
    pair.check()


def test_no_room_to_shrink_into_is_no_error():
    pair = Pair(2)
    pair.commit(np.ones((2, 400), bool), np.random.default_rng(0))
    pair.pool.release()
    pair.device.fake.memory = pair.device.fake.used
    pair.cache.leave(1, 1)
    pair.cache.leave(0, 0)
    assert pair.cache.slab.length == 512 and (pair.cache.positions == -1).all()


def test_a_window_or_rows_gathered_once():
    """Side by side they are read where they lie; others are copied, and again only after the cache has changed."""
    pair, rng = Pair(5), np.random.default_rng(0)
    copies = lambda: pair.device.fake.calls["cudaMemcpy3DAsync"]  # noqa: E731
    pair.part([1, 3])  # nothing to copy
    pair.commit(rng.random((5, 90)) < 0.7, rng)
    before = copies()
    for rows in ([0, 1, 2, 3, 4], [0, 1], [3], [2, 3, 4]):
        assert pair.part(rows).slab is pair.cache.slab
    assert copies() == before
    gathered = pair.part([0, 1, 3, 4])
    assert copies() == before + 2 and gathered.slab is not pair.cache.slab and gathered.table.stale
    assert pair.part([0, 1, 3, 4]) is gathered and copies() == before + 2
    assert pair.part([4, 0, 2, 1]).part(0) == gathered.part(0) and copies() == before + 6
    pair.commit(np.ones((4, 5), bool), rng, into=[4, 0, 2, 1])
    assert pair.part([4, 0, 2, 1]).part(0) == gathered.part(0)
    pair.part([2, 2, 0, 2, 2])  # one row for several of a forward
    pair.clear([0])
    pair.part([4, 0, 2, 1])
    pair.leave(1, 4)
    pair.part([3, 0])
    pair.commit(np.ones((2, 100), bool), rng, into=[3, 0])
    assert pair.part([0, 2]).length == 256


def test_rows_that_lie_unaligned_are_gathered():
    pair = Pair(3, heads=1, head_dim=4, capacity=140)  # rows of 140 · 4 · 2 bytes
    pair.commit(np.ones((3, 140), bool), np.random.default_rng(0))
    assert pair.cache.part([0, 1]).slab is pair.cache.slab
    got, want = pair.cache.part([1, 2]), pair.host.part([1, 2])
    assert got.slab is not pair.cache.slab and got.part(0) % 256 == got.positions_address % 256 == 0
    pair.device.synchronize(pair.stream)
    assert all(np.array_equal(mine, theirs[:, :, :140])
               for mine, theirs in zip(pair.parts(got), (*want.keys, *want.values), strict=True))


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
    pair.leave(0, 2)
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
    one, other = (data.draw(st.tuples(st.integers(1, 3), st.integers(1, 9))) for _ in range(2))
    pair = Pair(rows, dtype=data.draw(st.sampled_from([np.float16, np.float32])),
                layers=data.draw(st.lists(st.sampled_from([one, other]), min_size=1, max_size=3)))
    last = rows - 1
    for _ in range(data.draw(st.integers(1, 8))):
        if not data.draw(st.integers(0, 4)):
            pair.clear(sorted(data.draw(st.sets(st.integers(0, rows - 1)))))
        elif data.draw(st.integers(0, 3)):
            width = data.draw(st.sampled_from([1, 2, 7, 32, 130]))
            chance = data.draw(st.sampled_from([0.1, 0.5, 0.95, 1.1]))
            into = data.draw(st.permutations(range(rows)))[:data.draw(st.integers(1, rows))]
            pair.part(into)
            pair.commit(rng.random((len(into), width)) < chance, rng, data.draw(st.integers(0, 2)), into)
        else:
            pair.leave(data.draw(st.integers(0, last)), last)
            last = max(0, last - 1)
        if data.draw(st.booleans()):
            pair.check()
    pair.check()
