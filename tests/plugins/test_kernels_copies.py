"""Asynchronous copies and matrix fragments of the emulated thread block: right, and noticed when used wrongly."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_helpers import library, pointer

WORDS = np.arange(1024, dtype=np.uint32) + 7


@pytest.fixture(autouse=True)
def _start_seed():
    yield
    library().dmoe_emulation_seed(0)


def run(name, seed=0, words=WORDS):
    out = np.zeros(64, np.float32)
    library().dmoe_emulation_seed(seed)
    code = library().dmoe_emulation_copies(name.encode(), pointer(words), pointer(out))
    return code, out, library().dmoe_emulation_message()


def expected(seed, second_group=True):
    thread = np.arange(64)
    poison = [0xffffffff, 0xcccccccc][seed % 2]
    second = np.where(thread % 2 == 0, 519 + 4 * thread, 0) if second_group else np.full(64, poison)
    third = 7 + 4 * thread if second_group else second
    out = np.where(thread < 20, 7 + 4 * (thread + 40), np.where(thread < 40, second, third))
    return np.where(thread < 60, out, 0).astype(np.float32)


@pytest.mark.parametrize("seed", range(4))
def test_copies_arrive_in_the_wait_for_their_group(seed):
    code, out, message = run("waited", seed)
    assert (code, message) == (0, b"")
    np.testing.assert_array_equal(out, expected(seed))
    code, out, _ = run("first_group", seed)
    assert code == 0
    np.testing.assert_array_equal(out, expected(seed, second_group=False), "what nobody waited for is poison")


@pytest.mark.parametrize("name", ["not_waited", "no_barrier"])
def test_a_missing_wait_or_barrier_shows(name):
    assert any((run(name, seed)[1] != expected(seed)).any() for seed in range(4))
    assert len({run(name, seed)[1].tobytes() for seed in range(8)}) > 1


@pytest.mark.parametrize(("name", "text"), [
    ("not_drained", b"copies under way"),
    ("no_dynamic", b"asked for no dynamic shared memory"),
    ("too_much", b"more dynamic shared memory than a thread block can have"),
])
def test_misuse_ends_with_a_message(name, text):
    code, _, message = run(name)
    assert code == -5 and text in message
    assert run("waited")[0] == 0, "the next launch is not affected"


def test_matrices_in_the_lanes():
    """Lane 5 (g = 1, q = 1): row 1, columns 2 and 3; transposed, column 1 of rows 2 and 3."""
    halfs = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    words = np.zeros(1024, np.uint32)
    words[:128] = halfs.reshape(-1).view(np.uint32)
    code, out, _ = run("matrices", words=words)
    assert code == 0
    np.testing.assert_array_equal(out[:8], halfs[:, 1, 2:4].ravel())
    np.testing.assert_array_equal(out[8:16], halfs[:, 2:4, 1].ravel())
