"""The kernels that rank candidates, emulated, against the definition; and that against torch's sort."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from candidates_helpers import draw, kernel_candidates
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from kernel_helpers import Output, library, pointer

from dmoe_export.runtime.candidates import MOST, best_of
from dmoe_export.runtime.gpu.candidates import ShapeC

KINDS = ("spread", "near", "few", "equal", "special")


@pytest.fixture(autouse=True)
def _start_seed():
    yield
    library().dmoe_emulation_seed(0)


def assert_same(got, want):
    np.testing.assert_array_equal(got.token_ids, want.token_ids)
    np.testing.assert_array_equal(got.logits, want.logits)  # NaN equals NaN


def assert_sorted(logits, mask_id, found):
    """The first of torch's stable sort, which has NaN first, too."""
    if 0 <= mask_id < logits.shape[-1]:
        others = np.delete(np.arange(logits.shape[-1]), mask_id)
    else:
        others = np.arange(logits.shape[-1])
    values, order = torch.sort(torch.from_numpy(logits[..., others]), descending=True, stable=True)
    count = min(found.token_ids.shape[-1], len(others))
    np.testing.assert_array_equal(found.token_ids[..., :count], others[order.numpy()][..., :count])
    np.testing.assert_array_equal(found.logits[..., :count], values.numpy()[..., :count])
    assert (found.token_ids[..., count:] == -1).all() and (found.logits[..., count:] == -np.inf).all()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(1, 3), st.integers(1, 4), st.integers(2, 700), st.integers(1, 200), st.sampled_from(KINDS),
       st.integers(-1, 40), st.integers(0, 2**32 - 1))
@example(1, 1, 2, 1, "spread", 0, 0)
@example(1, 2, 129, 2, "equal", 128, 1)
@example(2, 1, 300, 1024, "special", 299, 2)
def test_any_size(rows, kept, vocabulary, count, kind, mask_id, seed):
    rng = np.random.default_rng(seed)
    logits = draw(rng, (rows, kept, vocabulary), kind)
    want = best_of(logits, mask_id, count)
    assert_sorted(logits, mask_id, want)
    library().dmoe_emulation_seed(seed % 4)
    wanted = int(rng.integers(1, kept + 1))
    got = kernel_candidates(logits, mask_id, count, wanted)
    assert_same(got, best_of(logits[:, :wanted], mask_id, count))


@pytest.mark.parametrize(("vocabulary", "count", "kind"), [
    *[(20_001, 64, kind) for kind in KINDS], *[(9_000, 1024, kind) for kind in KINDS],
    (300_007, 40, "spread"), (300_007, 40, "special")])  # the last have groups of 256
def test_large_vocabularies(vocabulary, count, kind):
    """Also where equal logits are more than a thread block has room for; the mask is the best one."""
    logits = draw(np.random.default_rng(count), (1, 1, vocabulary), kind)
    mask_id = int(best_of(logits, -1, 1).token_ids[0, 0, 0])
    want = best_of(logits, mask_id, count)
    assert_sorted(logits, mask_id, want)
    for order in (0, 3):
        library().dmoe_emulation_seed(order)
        assert_same(kernel_candidates(logits, mask_id, count), want)


def test_more_equal_ones_than_there_is_room_for_come_before_the_best():
    """The thread block has sorted and thrown away when it meets them."""
    logits = np.zeros((1, 1, 12_000), np.float32)
    logits[..., -5:] = [1, 3, 2, 3, 1]
    found = kernel_candidates(logits, -1, 100)
    assert found.token_ids[0, 0].tolist() == [11_996, 11_998, 11_997, 11_995, 11_999, *range(95)]


def test_launches():
    before = library().dmoe_emulation_launches()
    kernel_candidates(np.zeros((2, 3, 500), np.float32), -1, 8)
    assert library().dmoe_emulation_launches() == before + 2


def test_nothing_is_wanted():
    for shape in (ShapeC(0, 4, 4, 300, 8), ShapeC(2, 0, 4, 300, 8)):
        assert library().dmoe_candidates(ctypes.byref(shape), 7, *[None] * 5) == 0


@pytest.mark.parametrize("change", [{"rows": -1}, {"wanted": -1}, {"wanted": 5}, {"vocabulary": 1},
                                    {"vocabulary": (1 << 24) + 1}, {"candidates": 0}, {"candidates": MOST + 1},
                                    {"rows": 1 << 20, "vocabulary": 1 << 18}])
def test_bad_shapes_are_refused(change):
    fields = {"rows": 2, "wanted": 4, "kept": 4, "vocabulary": 300, "candidates": 8} | change
    shape = ShapeC(*fields.values())
    assert library().dmoe_candidates_workspace_bytes(ctypes.byref(shape)) == -1
    assert library().dmoe_candidates(ctypes.byref(shape), 7, *[None] * 5) == -1


@pytest.mark.parametrize("which", range(4))
def test_bad_pointers_are_refused(which):
    shape = ShapeC(1, 4, 4, 300, 8)
    memory = Output((1 << 17,), np.uint8).array
    good = [pointer(memory)] * 4
    for bad in (None, ctypes.c_void_p(good[which].value + 8)):
        tensors = [*good[:which], bad, *good[which + 1:]]
        assert library().dmoe_candidates(ctypes.byref(shape), 7, *tensors, None) == -4
    assert library().dmoe_candidates(None, 7, *good, None) == -4
