"""`DmoeSelfAttention` as a custom op: bit for bit the kernel it wraps, and what it refuses. The emulated kernels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from fused_models import one_node
from kernel_helpers import BF16, FP16, from_half
from onnx import TensorProto
from ort_ops_helpers import session
from self_attention_helpers import Case, Sizes, make_case, run

from dmoe_export.ops.self_attention import NORMED_SCHEMA, SCHEMA

KINDS = pytest.mark.parametrize(("kind", "half"), [(FP16, TensorProto.FLOAT16), (BF16, TensorProto.BFLOAT16)],
                                ids=["fp16", "bf16"])
PLAIN = {"cos": TensorProto.FLOAT, "sin": TensorProto.FLOAT, "position_ids": TensorProto.INT64,
         "past_positions": TensorProto.INT64}
SIZES = Sizes(rows=2, tokens=9, past=140, heads=4, kv_heads=2, head_dim=48, rotary_dim=20)


def node(half: int, norms: bool = True, **changed) -> bytes:
    """A model of one node; attributes that are None are left out."""
    settings = {"block_length": 32, "eps": 1e-6, "head_norm": int(norms)} | changed
    return one_node(NORMED_SCHEMA if norms else SCHEMA, half, PLAIN,
                    **{name: value for name, value in settings.items() if value is not None})


def feeds(case: Case) -> dict[str, np.ndarray]:
    values = {name: getattr(case, name) for name in NORMED_SCHEMA.inputs if getattr(case, name) is not None}
    return {name: value if name in PLAIN else from_half(value, case.kind) for name, value in values.items()}


@KINDS
@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("block_length", [0, 4])
def test_equals_the_kernel(kind, half, norms, block_length):
    case = make_case(kind, replace(SIZES, block_length=block_length), norms=norms)
    found = session(node(half, norms, block_length=block_length)).run(None, feeds(case))
    for got, want in zip(found, run(case), strict=True):
        np.testing.assert_array_equal(got, from_half(want, kind))


@pytest.mark.parametrize("change", [{"rows": 0}, {"tokens": 0}])
def test_no_tokens(change):
    s = replace(SIZES, **change)
    mixed, key, value = session(node(TensorProto.FLOAT16)).run(None, feeds(make_case(FP16, s)))
    assert mixed.shape == (s.rows * s.tokens, 192) and key.shape == value.shape == (s.rows, 2, s.tokens, 48)


@pytest.mark.parametrize(("name", "shape", "text"), [
    ("qkv", (17, 384), r"qkv has shape \[17, 384\] where \[18, any\] is needed"),
    ("qkv", (18, 380), r"qkv has rows of 380 where a multiple of the head dimension 48 is needed"),
    ("cos", (2, 9, 10), r"cos has shape \[2, 9, 10\] where \[2, 9, 1, any\] is needed"),
    ("sin", (2, 9, 1, 9), r"sin has shape \[2, 9, 1, 9\] where \[2, 9, 1, 10\] is needed"),
    ("past_positions", (2, 139), r"past_positions has shape \[2, 139\] where \[2, 140\] is needed"),
    ("past_key", (1, 2, 140, 48), r"past_key has shape \[1, 2, 140, 48\] where \[2, any, any, any\] is needed"),
    ("past_value", (2, 2, 140, 32), r"past_value has shape \[2, 2, 140, 32\] where \[2, 2, 140, 48\] is needed"),
    ("k_norm", (32,), r"k_norm has shape \[32\] where \[48\] is needed"),
    ("qkv", (18, 4 * 48), r"attention: heads a multiple of key heads"),
])
def test_refuses_wrong_shapes(name, shape, text):
    values = feeds(make_case(FP16, SIZES))
    values[name] = np.zeros(shape, values[name].dtype)
    with pytest.raises(Exception, match=f"DmoeSelfAttention: .*{text}"):
        session(node(TensorProto.FLOAT16)).run(None, values)


@pytest.mark.parametrize(("change", "text"), [
    ({"block_length": -1}, "attribute block_length is -1 where 0"),
    ({"block_length": 1 << 40}, "attribute block_length is 1099511627776"),
    ({"head_norm": 2}, "attribute head_norm is 2 where 0 or 1"),
    ({"eps": None}, "eps"),
])
def test_refuses_wrong_attributes_when_it_is_loaded(change, text):
    with pytest.raises(Exception, match=f"DmoeSelfAttention: .*{text}"):
        session(node(TensorProto.FLOAT16, **change))


def test_refuses_an_eps_of_zero():
    with pytest.raises(Exception, match="DmoeSelfAttention: an attribute does not fit"):
        session(node(TensorProto.FLOAT16, eps=0.0)).run(None, feeds(make_case(FP16, SIZES)))


def test_norms_that_are_missing_are_said():
    values = feeds(make_case(FP16, SIZES, norms=False))
    with pytest.raises(Exception, match="DmoeSelfAttention: q_norm is missing"):
        session(node(TensorProto.FLOAT16, norms=False, head_norm=1)).run(None, values)


def test_refuses_float32():
    with pytest.raises(Exception, match=r"tensor\(float\).*\(qkv_half\) of operator \(DmoeSelfAttention\).*is invalid"):
        session(node(TensorProto.FLOAT))
