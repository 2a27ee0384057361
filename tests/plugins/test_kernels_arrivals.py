"""Bulk copies and the barriers that count what arrives, emulated: right, and noticed when used wrongly."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_helpers import library, pointer

WORDS = np.arange(1024, dtype=np.uint32) + 7
THREAD = np.arange(16)
EXPECTED = np.concatenate([part for phase in (0, 1) for part in (47 + 128 * phase + THREAD, 263 + 4 * (THREAD + 40))])


@pytest.fixture(autouse=True)
def _start_seed():
    yield
    library().dmoe_emulation_seed(0)


def run(name, seed=0):
    out = np.zeros(64, np.float32)
    library().dmoe_emulation_seed(seed)
    code = library().dmoe_emulation_arrivals(name.encode(), pointer(WORDS), pointer(out))
    return code, out, library().dmoe_emulation_message()


@pytest.mark.parametrize("seed", range(8))
def test_a_phase_brings_what_was_asked_for_in_it(seed):
    code, out, message = run("right", seed)
    assert (code, message) == (0, b"")
    np.testing.assert_array_equal(out, EXPECTED)


@pytest.mark.parametrize("name", ["not_waited", "other_parity"])
def test_reading_too_early_shows(name):
    """Whoever does not wait, or waits for a phase that has ended, finds poison or is caught."""
    for seed in range(8):
        code, out, _ = run(name, seed)
        assert code == -5 or (out != EXPECTED).any()


@pytest.mark.parametrize(("name", "text"), [
    ("too_few_bytes_expected", b"brings more than the 496 bytes expected"),
    ("too_many_bytes_expected", b"128 of 128 arrivals, 512 of 528 bytes"),
    ("an_arrival_is_missing", b"127 of 128 arrivals, 512 of 512 bytes"),
    ("no_fence", b"no fence between a barrier of the block and the bulk copy"),
    ("misaligned", b"not of multiples of 16 bytes"),
    ("ends_early", b"copies under way"),
])
def test_misuse_ends_with_a_message(name, text):
    for seed in range(4):
        code, _, message = run(name, seed)
        assert code == -5 and text in message
    assert run("right")[0] == 0, "the next launch is not affected"
