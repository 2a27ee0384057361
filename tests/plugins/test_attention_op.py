"""`DmoeAttention` on the CPU kernels: against float64 and the op's body, and the bits of a row in any company."""

from __future__ import annotations

import os
import subprocess
import sys

import attention_helpers as helpers
import numpy as np
import pytest
from attention_helpers import Sizes, beside, case, error, run
from cpu_ops_helpers import built
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.mark.parametrize("isa", ["avx512", "avx2", "generic"])
def test_every_instruction_set(isa):
    subprocess.run([sys.executable, helpers.__file__, str(built())], check=True, timeout=200,
                   env=os.environ | {"DMOE_CPU_ISA": isa, "OMP_NUM_THREADS": "1"})


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3), st.integers(1, 2), st.integers(1, 5), st.integers(1, 70), st.integers(1, 150),
       st.integers(1, 140), st.booleans(), st.integers(0, 99), st.sampled_from([np.float32, np.float16]))
def test_any_size(rows, heads, share, tokens, past, columns, full, seed, dtype):
    feeds = case(Sizes(rows, heads, share, tokens, past, columns), full, seed, dtype)
    assert error(built(), feeds) < helpers.TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("columns", [256, 512])
@pytest.mark.parametrize("tokens", [3, 40])
def test_wide_heads(tokens, columns, dtype):
    """Both of DiffusionGemma's, few and many queries of a piece."""
    for full in (True, False):
        feeds = case(Sizes(2, 2, 4, tokens, 50, columns), full, columns, dtype)
        feeds["q"] *= dtype((64 / columns) ** 0.5)  # scores as large as 64 columns make them: weights round with them
        assert error(built(), feeds) < helpers.TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("full", [True, False])
def test_the_body_agrees(full, dtype):
    feeds = case(Sizes(3, 2, 4, 37, 61, 24), full, 1, dtype)
    assert error(None, feeds) < helpers.TOLERANCE[dtype]


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 40), st.integers(0, 90), st.integers(0, 3), st.integers(0, 99), st.booleans(), st.booleans(),
       st.sampled_from([np.float32, np.float16]))
def test_a_row_does_not_depend_on_its_company(tokens, cached, others, seed, full, poison, dtype):
    """Bit for bit: whatever other rows hold, however wide they are, and whatever lies in places that are not seen."""
    sizes = Sizes(1, 2, 3, tokens, max(cached, 1), 20)
    alone = case(sizes, full, seed, dtype, cached=cached)
    want = run(built(), alone)[0].reshape(2, 3, tokens, 20)
    company, slot = beside(alone, others, seed, poison)
    got = run(built(), company)[slot]
    wide = company["key"].shape[2]
    np.testing.assert_array_equal(got.reshape(2, 3, wide, 20)[:, :, :tokens], want)


def test_a_query_that_sees_nothing_is_zero():
    feeds = case(Sizes(1, 1, 2, 3, 4, 8), True, 0, np.float32)
    feeds["bias"][:] = -1e30
    assert (run(built(), feeds) == 0).all()


@pytest.mark.parametrize(("change", "words"), [
    (lambda f: f.update(key=f["key"][:, :, :, 1:].copy()), r"key has shape \[2, 2, 5, 7\] where \[2, 2, any, 8\]"),
    (lambda f: f.update(value=f["value"][:, :, 1:].copy()), r"value has shape \[2, 2, 4, 8\] where \[2, 2, 5, 8\]"),
    (lambda f: f.update(past_value=f["past_value"][:1].copy()), r"past_value has shape \[1, 2, 6, 8\]"),
    (lambda f: f.update(bias=f["bias"][..., 1:].copy()), r"bias has shape \[2, 1, 1, 5, 10\]"),
    (lambda f: f.update(bias=f["bias"][:, :, :, :2].copy()), r"bias has shape \[2, 1, 1, 2, 11\]"),
    (lambda f: f.update(q=f["q"][:, :, :7].copy()), "q has 7 queries of a head, no multiple of the 5 tokens"),
])
def test_wrong_inputs_are_refused(change, words):
    feeds = case(Sizes(2, 2, 2, 5, 6, 8), False, 0, np.float32)
    change(feeds)
    with pytest.raises(Exception, match=words):
        run(built(), feeds)
