"""The kernel that adds and norms, emulated, against the eager op in float32 on the same 16-bit values."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from kernel_helpers import BF16, FP16, Output, from_half, library, pointer, to_half
from router_helpers import AddNormShapeC, kernel_add_norm

from dmoe_export.ops.add_norm.eager import add_norm

KINDS = pytest.mark.parametrize("kind", [FP16, BF16], ids=["fp16", "bf16"])


@pytest.fixture(autouse=True)
def _start_seed():
    yield
    library().dmoe_emulation_seed(0)


def make_case(kind, tokens, hidden, scale=1.0):
    rng = np.random.default_rng(tokens + hidden)
    return [to_half(rng.normal(size=shape) * scale, kind) for shape in ((tokens, hidden), (tokens, hidden), hidden)]


@KINDS
@pytest.mark.parametrize(("tokens", "hidden"), [(1, 8), (5, 264), (32, 2048), (2, 8192), (3, 8200), (2, 20000)])
@pytest.mark.parametrize(("scale", "eps"), [(1.0, 1e-6), (1e-3, 1e-5), (50.0, 0.0)])
def test_equals_eager(kind, tokens, hidden, scale, eps):
    """The total has the eager op's bits in this type; the norm is off by one rounding of the exact one at most."""
    case = make_case(kind, tokens, hidden, scale)
    library().dmoe_emulation_seed(tokens)
    total, normed = kernel_add_norm(kind, *case, eps)
    dtype = torch.float16 if kind == FP16 else torch.bfloat16
    halves = [torch.from_numpy(part.view(np.int16)).view(dtype) for part in case]
    want = add_norm(*halves, eps)[0]
    np.testing.assert_array_equal(total, want.view(torch.int16).numpy().view(np.uint16))
    zero = torch.zeros(tokens, hidden)
    exact = add_norm(want.float(), zero, halves[2].float(), eps)[1].numpy()
    unit, tiny = (2.0**-11, 2.0**-25) if kind == FP16 else (2.0**-8, 2.0**-140)
    error = np.abs(from_half(normed, kind) - exact)
    assert (error <= (unit + 4e-6) * np.abs(exact) + tiny).all()  # 4e-6: sums in another order, five operations


@KINDS
def test_same_bits_in_any_order_and_company(kind):
    case = make_case(kind, 9, 4104)
    results = set()
    for seed in (0, 1, 2, 99):
        library().dmoe_emulation_seed(seed)
        results.add(b"".join(part.tobytes() for part in kernel_add_norm(kind, *case, 1e-6)))
    assert len(results) == 1
    together = kernel_add_norm(kind, *case, 1e-6)
    alone = kernel_add_norm(kind, case[0][4:5], case[1][4:5], case[2], 1e-6)
    assert alone[0][0].tobytes() == together[0][4].tobytes() and alone[1][0].tobytes() == together[1][4].tobytes()


def test_one_launch():
    before = library().dmoe_emulation_launches()
    kernel_add_norm(FP16, *make_case(FP16, 300, 16), 1e-6)
    assert library().dmoe_emulation_launches() == before + 1


def test_overflow_and_not_a_number_stay_with_their_token():
    case = make_case(FP16, 3, 64)
    case[0][1, 7], case[1][1, 7], case[0][2, 0] = 0x7bff, 0x7bff, 0x7e00
    total, normed = (from_half(part, FP16) for part in kernel_add_norm(FP16, *case, 1e-6))
    assert np.isinf(total[1, 7]) and np.isnan(normed[1, 7]) and np.isnan(normed[2]).all()
    assert np.isfinite(total[0]).all() and np.isfinite(normed[0]).all()


def test_the_total_may_lie_where_x_lies():
    """As the residual stream of a layer does."""
    x, delta, weight = make_case(BF16, 4, 9000)
    want = kernel_add_norm(BF16, x, delta, weight, 1e-6)
    inputs, normed = [Output(part.shape, np.uint16) for part in (x, delta, weight)], Output(x.shape, np.uint16)
    for array, part in zip(inputs, (x, delta, weight), strict=True):
        array.array[...] = part
    x, delta, weight = (array.array for array in inputs)
    shape = AddNormShapeC(4, 9000, BF16)
    assert library().dmoe_add_norm(ctypes.byref(shape), ctypes.c_float(1e-6), pointer(x), pointer(delta),
                                   pointer(weight), pointer(x), pointer(normed.array), None) == 0
    np.testing.assert_array_equal(inputs[0].checked(), want[0])
    np.testing.assert_array_equal(normed.checked(), want[1])


@pytest.mark.parametrize(("change", "code"), [({"tokens": -1}, -1), ({"hidden": 12}, -1), ({"hidden": 0}, -1),
                                              ({"hidden": 1 << 19}, -1), ({"type": 2}, -3)])
def test_bad_shapes_are_refused(change, code):
    shape = AddNormShapeC(*({"tokens": 4, "hidden": 64, "type": BF16} | change).values())
    assert library().dmoe_add_norm(ctypes.byref(shape), ctypes.c_float(1e-6), *[None] * 6) == code


def test_bad_pointers_and_eps_are_refused_and_no_tokens_is_no_work():
    shape = AddNormShapeC(4, 64, BF16)
    assert library().dmoe_add_norm(ctypes.byref(shape), ctypes.c_float(1e-6), *[None] * 6) == -4
    assert library().dmoe_add_norm(ctypes.byref(shape), ctypes.c_float(-1e-6), *[None] * 6) == -2
    assert library().dmoe_add_norm(ctypes.byref(shape), ctypes.c_float(np.nan), *[None] * 6) == -2
    shape.tokens = 0
    assert library().dmoe_add_norm(ctypes.byref(shape), ctypes.c_float(1e-6), *[None] * 6) == 0
