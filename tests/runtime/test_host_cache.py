"""The cache in host memory against a list per row, with layers of one geometry and of two."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmoe_export.runtime.backend import ForwardInputs, ForwardOutputs
from dmoe_export.runtime.cache import HostCache

ROWS = 3
HEADS = {"alike": [(3, 4)] * 2, "two": [(2, 4), (1, 8), (2, 4)], "one number": [(1, 1), (2, 1)]}
"""(Hkv, D) layer by layer."""


class Lists:
    """A cache, and what it should hold: of each row its tokens in order, each a position and [Hkv, D] of every part."""

    def __init__(self, heads, seed):
        self.cache, self.heads = HostCache(ROWS, heads, np.dtype(np.float32)), heads
        self.held = [[] for _ in range(ROWS)]
        self.rng = np.random.default_rng(seed)

    def commit(self, take, rows):
        shape = (len(rows), take.shape[1])
        new = [self.rng.random((shape[0], count, shape[1], width), np.float32) for count, width in 2 * self.heads]
        positions = np.stack([len(self.held[row]) - 1 + marks.cumsum() for row, marks in zip(rows, take, strict=True)])
        nothing = np.zeros((1, 1))
        self.cache.commit(ForwardInputs(np.zeros(shape, np.int64), positions, np.full((len(rows), 1), -1), {}),
                          ForwardOutputs(nothing, nothing, nothing, None,
                                         (new[:len(self.heads)], new[len(self.heads):])), take, rows)
        for i, row in enumerate(rows):
            self.held[row] += [(int(positions[i, at]), [x[i, :, at] for x in new]) for at in np.flatnonzero(take[i])]

    def clear(self, row):
        self.cache.clear([row])
        self.held[row] = []

    def leave(self, row, last):
        self.cache.leave(row, last)
        self.held[row], self.held[last] = self.held[last], []

    def hand_over(self, source, to, at, blocks):
        """What a row has from its start, in blocks, appended to an empty row."""
        edges = [0, *[at * (i + 1) for i in range(blocks)]]
        read = [self.cache.read(source, start, stop) for start, stop in pairwise(edges)]
        assert all(block.nbytes == at * self.cache.token_bytes for block in read)
        self.clear(to)
        self.cache.write(to, read)
        self.held[to] = self.held[source][:edges[-1]] if source != to else self.held[to]

    def check(self):
        self._same(self.cache, self.held)

    def part(self, rows):
        self._same(self.cache.part(rows), [self.held[row] for row in rows])

    def _same(self, cache, held):
        arrays = (*cache.keys, *cache.values)
        assert [(x.shape[1], x.shape[3]) for x in arrays] == 2 * self.heads
        assert {(len(x), x.shape[2]) for x in arrays} == {cache.positions.shape}
        for row, tokens in enumerate(held):
            assert cache.lengths[row] == len(tokens)
            want = [position for position, _ in tokens]
            assert cache.positions[row].tolist() == want + [-1] * (cache.positions.shape[1] - len(want))
            for i, array in enumerate(arrays):
                assert np.isfinite(array[row]).all()
                for at, (_, parts) in enumerate(tokens):
                    assert np.array_equal(array[row, :, at], parts[i])


STEPS = st.lists(st.one_of(
    st.tuples(st.just("commit"), st.permutations(range(ROWS)), st.integers(1, ROWS), st.integers(1, 150)),
    st.tuples(st.just("clear"), st.integers(0, ROWS - 1)),
    st.tuples(st.just("leave"), st.integers(0, ROWS - 1)),
    st.tuples(st.just("hand_over"), st.integers(0, ROWS - 1), st.integers(0, ROWS - 1), st.integers(1, 3)),
    st.tuples(st.just("part"), st.permutations(range(ROWS)), st.integers(1, ROWS)),
), min_size=1, max_size=6)


@pytest.mark.parametrize("name", HEADS)
@settings(max_examples=40, deadline=None)
@given(steps=STEPS, seed=st.integers(0, 99))
def test_whatever_is_done_it_holds_what_the_lists_hold(name, steps, seed):
    both = Lists(HEADS[name], seed)
    for what, *how in steps:
        if what == "commit":
            rows, count, width = how
            both.commit(both.rng.random((count, width)) < 0.6, rows[:count])
        elif what == "clear":
            both.clear(how[0])
        elif what == "leave":
            both.leave(how[0], ROWS - 1)
        elif what == "hand_over":
            source, to, blocks = how
            if source != to and (at := len(both.held[source]) // blocks):
                both.hand_over(source, to, at, blocks)
        else:
            both.part(how[0][:how[1]])
        both.check()


@pytest.mark.parametrize("name", HEADS)
def test_a_token_s_bytes_are_those_of_the_arrays(name):
    cache = HostCache(1, HEADS[name], np.dtype(np.float16))
    assert cache.token_bytes == sum(x.nbytes for x in (*cache.keys, *cache.values))


def test_what_is_read_is_a_copy():
    both = Lists(HEADS["two"], 0)
    both.commit(np.ones((1, 5), bool), [0])
    block = both.cache.read(0, 0, 5)
    before = block.copy()
    for x in (*both.cache.keys, *both.cache.values):
        x[:] = np.nan
    assert np.array_equal(block, before)
