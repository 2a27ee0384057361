"""The vocabulary head's kernels, emulated, against the eager op on the same 16-bit values."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import numpy as np
import pytest
from head_helpers import (
    HeadAttributesC,
    HeadShapeC,
    assert_head,
    eager_head,
    kernel_head,
    make_case,
    reference_logits,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_helpers import BF16, FP16, Output, from_half, library, pointer, to_half

COMMON = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
KINDS = pytest.mark.parametrize("kind", [FP16, BF16], ids=["fp16", "bf16"])


@pytest.fixture(autouse=True)
def _start_seed():
    yield
    library().dmoe_emulation_seed(0)
    library().dmoe_emulation_shared_bytes(0)


def assert_right(case):
    assert_head(case, kernel_head(case))


@st.composite
def sizes(draw):
    rows, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 30))
    wanted = draw(st.integers(1, 14))
    vocabulary = draw(st.integers(2, 400))
    return {"rows": rows, "tokens": tokens, "wanted": wanted, "kept": draw(st.integers(0, wanted)),
            "hidden": 8 * draw(st.integers(1, 25)), "vocabulary": vocabulary,
            "mask_id": draw(st.integers(-1, vocabulary)), "seed": draw(st.integers(0, 2**32 - 1))}


@KINDS
@COMMON
@given(sizes(), st.integers(0, 3))
def test_any_size(kind, size, order):
    library().dmoe_emulation_seed(order)
    assert_right(make_case(kind, **size))


@KINDS
@pytest.mark.parametrize(("rows", "wanted"), [(1, 31), (1, 33), (5, 13), (3, 43), (1, 1027)],
                         ids=["32 a pass", "64 a pass", "128 a pass", "two passes", "two chunks"])
def test_every_number_of_tokens(kind, rows, wanted):
    library().dmoe_emulation_seed(rows)
    assert_right(make_case(kind, rows, 40, wanted, kept=min(wanted, 50), hidden=72, vocabulary=200, seed=wanted))


@KINDS
def test_equals_the_eager_op(kind):
    """Whose norm is not rounded: half a unit of each normed value is the difference."""
    case = make_case(kind, 2, 9, 6, kept=3, hidden=136, vocabulary=500)
    for got, want, tolerance in zip(kernel_head(case), eager_head(case), (0, 0.1, 0.1), strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype
        np.testing.assert_allclose(got, want, atol=tolerance if kind == BF16 else tolerance / 8)


@KINDS
def test_a_token_depends_on_nothing_else(kind):
    """Alone, in each variant, among two chunks, in any order of threads and blocks: the same bits."""
    case = make_case(kind, 1, 30, 1, hidden=136, vocabulary=700, seed=5)
    want = [part.tobytes() for part in kernel_head(case)]
    for seed, count in [(1, 1), (2, 20), (3, 50), (4, 90), (1234567, 150)]:
        library().dmoe_emulation_seed(seed)
        rows = np.random.default_rng(seed).integers(-1, 30, (1, count))
        rows[0, -1] = case.logit_rows[0, 0]
        ids, confidence, logits = kernel_head(replace(case, logit_rows=rows, kept=count))
        assert [ids[:, -1:].tobytes(), confidence[:, -1:].tobytes(), logits[:, -1:].tobytes()] == want


@pytest.mark.parametrize("shared", [64, 99, 163], ids=["7.5", "8.6, 8.9, 12.0", "8.0"])
def test_devices_with_less_shared_memory_give_the_same_bits(shared):
    """In more passes, where the stages for many tokens do not fit."""
    case = make_case(BF16, 2, 30, 70, kept=2, hidden=80, vocabulary=150)
    want = [part.tobytes() for part in kernel_head(case)]
    library().dmoe_emulation_shared_bytes(shared << 10)
    assert [part.tobytes() for part in kernel_head(case)] == want


def test_launches():
    """Three for any number of tokens up to 1024."""
    counts = []
    for wanted in (1, 40, 200):
        before = library().dmoe_emulation_launches()
        kernel_head(make_case(FP16, wanted=wanted, hidden=16, vocabulary=40))
        counts.append(library().dmoe_emulation_launches() - before)
    assert counts == [3, 3, 3]


@KINDS
@pytest.mark.parametrize("places", [[3, 19], [20, 43], [100, 140], [127, 128], [5, 6, 300], [299, 300]])
def test_equal_logits_go_to_the_lower_token(kind, places):
    """Within a lane, a warp, a tile, and across tiles, of which the last has one row."""
    case = make_case(kind, hidden=64, vocabulary=301, mask_id=-1, seed=8)
    weight = case.weight.copy()
    logits = kernel_head(case)[2]
    weight[places] = weight[logits[0, 0].argmax()]
    weight[logits[0, 0].argmax()] = 0
    ids, _, logits = kernel_head(replace(case, weight=weight))
    assert ids[0, 0] == places[0] and (logits[0, 0, places] == logits[0, 0].max()).all()


@KINDS
@pytest.mark.parametrize(("vocabulary", "mask_id"), [(300, 100), (257, 256), (2, 0), (2, 1), (129, 5)])
def test_the_mask_token_is_no_answer(kind, vocabulary, mask_id):
    """Though its logit is the largest by far; also where a tile has no other token."""
    case = make_case(kind, wanted=1, vocabulary=vocabulary, mask_id=-1, seed=3)
    weight = from_half(case.weight, kind)
    normed = reference_logits(replace(case, weight=to_half(np.eye(64), kind)))[0][0, 0]
    weight[mask_id] = normed
    case = replace(case, weight=to_half(weight, kind))
    assert kernel_head(case)[0][0, 0] == mask_id
    case = replace(case, mask_id=mask_id)
    assert kernel_head(case)[0][0, 0] != mask_id
    assert_right(case)


@KINDS
def test_places_outside_the_row_are_its_ends(kind):
    case = make_case(kind, 2, 5, 4)
    outside = replace(case, logit_rows=np.array([[-1, -(2**40), 5, 2**40], [4, 0, 4, 4]]))
    inside = replace(case, logit_rows=np.array([[0, 0, 4, 4], [4, 0, 4, 4]]))
    for got, want in zip(kernel_head(outside), kernel_head(inside), strict=True):
        np.testing.assert_array_equal(got, want)


@KINDS
@pytest.mark.parametrize("bad", [40, 299])
def test_nan_is_above_all_and_has_no_confidence(kind, bad):
    case = make_case(kind, vocabulary=300, seed=4)
    weight = case.weight.copy()
    weight[bad] = 0x7fff
    ids, confidence, logits = kernel_head(replace(case, weight=weight))
    assert (ids == bad).all() and np.isnan(confidence).all()
    assert np.isnan(logits).sum() == 4 and np.isnan(logits[..., bad]).all()
    ids, confidence, _ = kernel_head(replace(case, weight=weight, mask_id=bad))
    assert (ids != bad).all() and np.isfinite(confidence).all()


@KINDS
def test_a_token_of_nan_disturbs_no_other(kind):
    case = make_case(kind, 1, 6, 6, mask_id=0)
    case = replace(case, logit_rows=np.arange(6)[None])
    want = kernel_head(case)
    hidden = case.hidden.copy()
    hidden[2, 5] = 0x7fff
    got = kernel_head(replace(case, hidden=hidden))
    others = [0, 1, 3, 4, 5]
    for part, expected in zip(got, want, strict=True):
        np.testing.assert_array_equal(part[:, others], expected[:, others])
    assert got[0][0, 2] == 1 and np.isnan(got[1][0, 2]) and np.isnan(got[2][0, 2]).all()


def test_infinite_logits():
    """The largest finite half times a norm of many: infinite in fp16 weights only by infinite weights."""
    case = make_case(FP16, wanted=1, hidden=8, vocabulary=600, seed=6)
    positive = replace(case, hidden=to_half(np.ones_like(case.hidden), FP16), mask_id=-1)
    weight = from_half(case.weight, FP16)
    weight[:200] = -np.inf  # more than a tile of them
    ids, confidence, logits = kernel_head(replace(positive, weight=to_half(weight, FP16)))
    finite = logits[0, 0, 200:].astype(np.float64)
    assert (logits[0, 0, :200] == -np.inf).all() and ids[0, 0] == 200 + finite.argmax()
    np.testing.assert_allclose(confidence[0, 0], 1 / np.exp(finite - finite.max()).sum(), rtol=1e-5)
    weight[[300, 301]] = np.inf
    ids, confidence, _ = kernel_head(replace(positive, weight=to_half(weight, FP16)))
    assert ids[0, 0] == 300 and np.isnan(confidence[0, 0])
    ids, confidence, _ = kernel_head(replace(positive, weight=to_half(np.full_like(weight, -np.inf), FP16)))
    assert ids[0, 0] == 0 and np.isnan(confidence[0, 0])


def test_no_logits_are_kept_and_nothing_is_wanted():
    ids, _, logits = kernel_head(make_case(FP16, kept=0))
    assert logits.shape == (1, 0, 300) and (ids >= 0).all()
    for rows, wanted in ((0, 4), (2, 0)):
        shape, attributes = HeadShapeC(rows, 0, wanted, 0, 64, 300, FP16), HeadAttributesC(1e-5, 7)
        assert library().dmoe_head(ctypes.byref(shape), ctypes.byref(attributes), *[None] * 9) == 0


@pytest.mark.parametrize("change", [{"rows": -1}, {"tokens": 0}, {"tokens": -1}, {"wanted": -1}, {"kept": 5},
                                    {"kept": -1}, {"hidden": 12}, {"hidden": 0}, {"hidden": 1 << 19}, {"vocabulary": 1},
                                    {"vocabulary": (1 << 24) + 1}, {"rows": 1 << 20, "wanted": 1 << 20}, {"type": 2}])
def test_bad_shapes_are_refused(change):
    fields = {"rows": 2, "tokens": 8, "wanted": 4, "kept": 2, "hidden": 64, "vocabulary": 300, "type": FP16} | change
    shape, attributes = HeadShapeC(*fields.values()), HeadAttributesC(1e-5, 7)
    code = -3 if "type" in change else -1
    assert library().dmoe_head_workspace_bytes(ctypes.byref(shape)) == code
    assert library().dmoe_head(ctypes.byref(shape), ctypes.byref(attributes), *[None] * 9) == code


@pytest.mark.parametrize("which", range(8))
def test_bad_pointers_are_refused(which):
    shape, attributes = HeadShapeC(1, 8, 4, 2, 64, 300, FP16), HeadAttributesC(1e-5, 7)
    memory = Output((1 << 17,), np.uint8).array
    good = [pointer(memory)] * 8
    for bad in (None, ctypes.c_void_p(good[which].value + 8)):
        tensors = [*good[:which], bad, *good[which + 1:]]
        assert library().dmoe_head(ctypes.byref(shape), ctypes.byref(attributes), *tensors, None) == -4
    assert library().dmoe_head(ctypes.byref(shape), None, *good, None) == -4


def test_workspace_is_bounded():
    """Many wanted tokens go through it in chunks of 1024; LLaDA2.0-mini's size."""
    sizes = [library().dmoe_head_workspace_bytes(ctypes.byref(HeadShapeC(rows, 32, 32, 1, 2048, 157184, BF16)))
             for rows in (1, 32, 100)]
    assert sizes[0] < 0.7e6 and sizes[1] == sizes[2] < 20e6
