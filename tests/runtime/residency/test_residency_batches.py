"""When a denoise step of a batch counts as the first of a block: rows come, go and take turns."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from dmoe_export.runtime.backend import ForwardInputs
from dmoe_export.runtime.residency.backend import ResidentBackend

BLOCK = 4


@pytest.fixture
def backend():
    inner = SimpleNamespace(name="b", description=SimpleNamespace(step_tokens=lambda routing: BLOCK), limits=None,
                            routing=SimpleNamespace(block_length=BLOCK), opens_blocks=False,
                            new_cache=lambda rows: None)
    return ResidentBackend(inner, None, SimpleNamespace(close=lambda: None), None)


def step(backend, blocks, sequences=None):
    """Rows that decode these blocks; None: a row that asks for nothing."""
    positions = np.array([[-1] * BLOCK if block is None else range(block * BLOCK, (block + 1) * BLOCK)
                          for block in blocks])
    rows = np.where(positions < 0, -1, np.arange(BLOCK))
    return backend._step(ForwardInputs(positions, positions, rows, {}, sequences=sequences))


def test_one_sequence_begins_each_of_its_blocks(backend):
    assert step(backend, [None]) == (False, False)
    for block, begins in ((3, True), (3, False), (4, True), (4, False), (4, False)):
        assert step(backend, [block]) == (True, begins)
    backend.new_cache(1)
    assert step(backend, [4]) == (True, True)  # another request's


def test_half_of_the_sequences_make_a_beginning(backend):
    names = (7, 3, 9, 8)
    assert step(backend, [0, 0, 0, 0], names) == (True, True)
    assert step(backend, [1, 0, 0, 0], names) == (True, False)
    assert step(backend, [2, 1, 0, 0], names) == (True, True)
    assert step(backend, [None, 1, 0, None], names) == (True, False)


def test_places_and_turns_do_not_matter(backend):
    step(backend, [5, 6, 7], (1, 2, 3))
    assert step(backend, [7, 5], (3, 1)) == (True, False)  # others took part, in other places
    backend.new_cache(8)  # of another batch, whose rows have other names
    assert step(backend, [6], (2,)) == (True, False)
    assert step(backend, [6], (4,)) == (True, True)


def test_what_is_remembered_is_bounded(backend):
    for name in range(3000):
        step(backend, [1], (name,))
    assert len(backend._blocks) <= 1024
    assert step(backend, [1], (2999,)) == (True, False)
