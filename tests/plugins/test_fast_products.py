"""Fast products of the CPU kernels: against float64 products of rounded activations, on every instruction set."""

from __future__ import annotations

import os
import subprocess
import sys

import cpu_ops_helpers
import fast_helpers as helpers
import linear_helpers
import numpy as np
import pytest
from cpu_ops_helpers import ACTIVATIONS, built
from fast_helpers import EXACT, EXPERTS, LINEAR, TOLERANCE
from hypothesis import given, settings
from hypothesis import strategies as st

INTEGERS = [kind for kind in LINEAR if "int" in kind]


@pytest.mark.parametrize("isa", ["avx512-bf16", "avx512-vnni", "avx-vnni", "avx2", "generic"])
def test_every_instruction_set(isa):
    """One that this processor lacks gives way to a lesser one."""
    subprocess.run([sys.executable, helpers.__file__, str(built())], check=True, timeout=200,
                   env=os.environ | {"DMOE_CPU_ISA": isa, "OMP_NUM_THREADS": "1"})


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 70), st.integers(1, 9), st.sampled_from([32, 64, 128]), st.integers(1, 100), st.booleans(),
       st.integers(0, 99), st.sampled_from(INTEGERS))
def test_integers_at_any_size(tokens, groups, group, rows, bias, seed, kind):
    feeds = linear_helpers.case(tokens, groups * group, rows, bias, seed, kind, group)
    assert helpers.linear_error(built(), kind, feeds, group) < TOLERANCE


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 70), st.integers(1, 300), st.integers(1, 100), st.booleans(), st.integers(0, 99))
def test_bfloat_at_any_size(tokens, columns, rows, bias, seed):
    feeds = linear_helpers.case(tokens, columns, rows, bias, seed, "bfloat weights")
    assert helpers.linear_error(built(), "bfloat weights", feeds) < TOLERANCE


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(EXPERTS), st.sampled_from([32, 64]), st.integers(1, 60), st.integers(1, 3), st.integers(1, 3),
       st.integers(0, 99), st.sampled_from(ACTIVATIONS))
def test_experts_at_any_size(kind, group, tokens, hidden, width, seed, activation):
    feeds = cpu_ops_helpers.case(kind, tokens, 2, 5, hidden * group, width * group, group, seed)
    helpers.check_experts(built(), kind, feeds, group, activation)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("tokens", [3, 40])
def test_the_largest_integers_do_not_overflow(kind, tokens):
    """Every product at its extreme, of either sign; what 16 bits saturate at would differ by far."""
    feeds = linear_helpers.case(tokens, 256, 12, kind=kind, group=128)
    feeds["x"][:] = np.where(np.arange(tokens)[:, None] % 2, -1, 1)
    feeds["w"][:6], feeds["w"][6:] = 0, 255
    assert helpers.linear_error(built(), kind, feeds, 128) < TOLERANCE


@pytest.mark.parametrize("kind", LINEAR)
@pytest.mark.parametrize("tokens", [3, 40])
def test_a_token_does_not_depend_on_the_others(tokens, kind):
    """Bit for bit; what is not finite stays with its token, and is never a number."""
    feeds = linear_helpers.case(tokens, 192, 70, kind=kind)
    want = helpers.linear(built(), kind, feeds)
    turned = helpers.linear(built(), kind, feeds | {"x": feeds["x"][::-1].copy()})
    np.testing.assert_array_equal(turned[::-1], want)
    feeds["x"][1, 5] = np.nan
    got = helpers.linear(built(), kind, feeds)
    assert np.isnan(got[1]).all()
    np.testing.assert_array_equal(np.delete(got, 1, 0), np.delete(want, 1, 0))
    if kind in INTEGERS:
        feeds["x"][1, 5] = np.inf
        assert not np.isfinite(helpers.linear(built(), kind, feeds)[1]).any()


@pytest.mark.parametrize("kind", ["float", "half", "half weights"])
def test_other_weights_keep_their_bits(kind):
    feeds = linear_helpers.case(20, 192, 70, kind=kind)
    np.testing.assert_array_equal(helpers.linear(built(), kind, feeds), linear_helpers.run(built(), feeds, kind))


def test_zeros_are_zeros():
    feeds = linear_helpers.case(20, 96, 7, kind="int8")
    feeds["x"][:] = 0
    assert not helpers.linear(built(), "int8", feeds).any()


def test_products_are_named():
    names = {format: [helpers.products(built(), format, fast) for fast in (False, True)] for format in helpers.FORMATS}
    assert all(exact == EXACT for exact, _ in names.values())
    assert names["float"][1] == names["half"][1] == EXACT
    assert names["int8"][1] == names["int4"][1]
    assert helpers.products(built(), "none") == ""
