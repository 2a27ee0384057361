"""DmoeHead as a custom op of ONNX Runtime, on the emulated kernels: against the kernel, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from fused_models import one_node
from head_helpers import EPS, kernel_head, make_case
from kernel_helpers import BF16, FP16, from_half
from onnx import TensorProto
from ort_ops_helpers import session

from dmoe_export.ops.head import SCHEMA

HALVES = pytest.mark.parametrize(("kind", "half"), [(FP16, TensorProto.FLOAT16), (BF16, TensorProto.BFLOAT16)],
                                 ids=["fp16", "bf16"])


def feeds_of(case):
    """A kernel's case as the inputs of the node."""
    halfs = [from_half(part, case.kind) for part in (case.hidden, case.norm, case.weight)]
    return dict(zip(SCHEMA.inputs, (*halfs, case.logit_rows, np.zeros(case.kept, np.int64)), strict=True))


@HALVES
@pytest.mark.parametrize(("rows", "wanted", "kept"), [(1, 3, 3), (2, 20, 1)])
def test_equals_the_kernel(kind, half, rows, wanted, kept):
    case = make_case(kind, rows, 9, wanted, kept)
    results = session(one_node(SCHEMA, half, eps=EPS, mask_id=case.mask_id)).run(None, feeds_of(case))
    for got, want in zip(results, kernel_head(case), strict=True):
        np.testing.assert_array_equal(got, want)
        assert got.dtype == want.dtype


def test_nothing_wanted():
    case = make_case(FP16)
    for rows in (np.zeros((0, 4), np.int64), np.zeros((2, 0), np.int64)):
        feeds = feeds_of(case) | {"logit_rows": rows, "logits_kept": np.zeros(0, np.int64)}
        if not len(rows):
            feeds["hidden"] = feeds["hidden"][:0]
        ids, confidence, logits = session(one_node(SCHEMA, TensorProto.FLOAT16, eps=EPS, mask_id=1)).run(None, feeds)
        assert ids.shape == confidence.shape == rows.shape and logits.shape == (len(rows), 0, 300)


@pytest.mark.parametrize(("name", "shape", "text"), [
    ("hidden", (8, 2, 32), r"hidden has shape \[8, 2, 32\] where \[any, any\] is needed"),
    ("norm", (63,), r"norm has shape \[63\] where \[64\] is needed"),
    ("weight", (300, 72), r"weight has shape \[300, 72\] where \[any, 64\] is needed"),
    ("logit_rows", (4,), r"logit_rows has shape \[4\] where \[any, any\] is needed"),
    ("logit_rows", (3, 4), "hidden has 8 tokens, no multiple of the 3 rows of logit_rows"),
    ("logits_kept", (5,), "logits_kept has 5 places, logit_rows only 4"),
    ("weight", (1, 64), "a size is outside the kernel's limits: .*vocabulary"),
])
def test_wrong_shapes_are_refused(name, shape, text):
    feeds = feeds_of(make_case(FP16))
    feeds[name] = np.zeros(shape, feeds[name].dtype)
    with pytest.raises(Exception, match=f"DmoeHead: {text}"):
        session(one_node(SCHEMA, TensorProto.FLOAT16, eps=EPS, mask_id=7)).run(None, feeds)


@pytest.mark.parametrize(("attributes", "text"), [
    ({"eps": EPS}, "mask_id"), ({"mask_id": 7}, "eps"),
    ({"eps": EPS, "mask_id": 1 << 40}, "DmoeHead: attribute mask_id is 1099511627776, not an int32"),
])
def test_wrong_attributes_are_refused_when_it_is_loaded(attributes, text):
    with pytest.raises(Exception, match=text):
        session(one_node(SCHEMA, TensorProto.FLOAT16, **attributes))


def test_float32_is_refused():
    with pytest.raises(Exception, match=r"of operator \(DmoeHead\).*is invalid"):
        session(one_node(SCHEMA, TensorProto.FLOAT, eps=EPS, mask_id=7))
