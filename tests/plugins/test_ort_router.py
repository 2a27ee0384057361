"""DmoeRouter and DmoeAddNorm as custom ops of ONNX Runtime, on the emulated kernels; and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from fused_models import one_node
from kernel_helpers import BF16, FP16, from_half, to_half
from onnx import TensorProto
from ort_ops_helpers import session
from router_helpers import kernel_add_norm, kernel_router

from dmoe_export.ops import add_norm, router
from dmoe_export.ops.block_route.attributes import RouteAttributes

HALVES = pytest.mark.parametrize(("kind", "half"), [(FP16, TensorProto.FLOAT16), (BF16, TensorProto.BFLOAT16)],
                                 ids=["fp16", "bf16"])
F32, I32, I64 = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64
KINDS = {"router_weight": F32, "expert_bias": F32, "position_ids": I64, "top_p": F32, "min_experts": I64,
         "coreset_size": I64, "router_logits": F32}
CHOSEN = {"top_p": 0.45, "min_experts": 6, "coreset_size": 7}


def routing(mode="top_p", score="sigmoid", **changes):
    attributes = RouteAttributes(mode, 8, 4, 4, 2, 2.5, score).node_attributes()
    return {name: value for name, value in (attributes | changes).items() if not name.startswith("plugin_")}


def router_feeds(kind, rows=2, tokens=13):
    rng = np.random.default_rng(rows)
    hidden = from_half(to_half(rng.normal(size=(rows * tokens, 40)), kind), kind)
    positions = np.tile(np.arange(tokens), (rows, 1)) + 5
    positions[-1, tokens * 2 // 3:] = -1
    values = (hidden, rng.normal(size=(32, 40)).astype(np.float32), (rng.normal(size=32) * 0.05).astype(np.float32),
              positions, np.float32([CHOSEN["top_p"]]), np.int64([CHOSEN["min_experts"]]),
              np.int64([CHOSEN["coreset_size"]]))
    return dict(zip(router.SCHEMA.inputs, values, strict=True))


def add_norm_feeds(tokens=5, hidden=72):
    rng = np.random.default_rng(tokens)
    return {name: rng.normal(size=shape).astype(np.float32)
            for name, shape in zip(add_norm.SCHEMA.inputs, ((tokens, hidden), (tokens, hidden), (hidden,)),
                                   strict=True)}


@HALVES
@pytest.mark.parametrize(("mode", "score"), [("token", "sigmoid"), ("top_p", "softmax"), ("top_c", "sigmoid")])
def test_router_equals_the_kernel(kind, half, mode, score):
    feeds = router_feeds(kind)
    results = session(one_node(router.SCHEMA, half, KINDS, **routing(mode, score))).run(None, feeds)
    hidden, weight, bias, positions = list(feeds.values())[:4]
    want = kernel_router(kind, RouteAttributes(mode, 8, 4, 4, 2, 2.5, score), to_half(hidden, kind), weight, bias,
                         positions, **CHOSEN)
    for got, expected in zip(results, want, strict=True):
        np.testing.assert_array_equal(got, expected)
        assert got.dtype == expected.dtype


def test_router_without_the_logits():
    loaded = session(one_node(router.SCHEMA, TensorProto.FLOAT16, KINDS, **routing()))
    feeds = router_feeds(FP16)
    ids, weights, _ = loaded.run(None, feeds)
    short = session(one_node(router.SCHEMA, TensorProto.FLOAT16, KINDS, without=("router_logits",), **routing()))
    got = short.run(None, feeds)
    np.testing.assert_array_equal(got[0], ids)
    np.testing.assert_array_equal(got[1], weights)


@HALVES
def test_add_norm_equals_the_kernel(kind, half):
    feeds = add_norm_feeds()
    results = session(one_node(add_norm.SCHEMA, half, eps=1e-5)).run(None, feeds)
    want = kernel_add_norm(kind, *(to_half(value, kind) for value in feeds.values()), 1e-5)
    for got, words in zip(results, want, strict=True):
        np.testing.assert_array_equal(got, from_half(words, kind))


def test_no_tokens():
    feeds = router_feeds(FP16, 1, 0)
    results = session(one_node(router.SCHEMA, TensorProto.FLOAT16, KINDS, **routing())).run(None, feeds)
    assert [x.shape for x in results] == [(0, 4), (0, 4), (1, 0, 32)]
    results = session(one_node(add_norm.SCHEMA, TensorProto.FLOAT16, eps=1e-5)).run(None, add_norm_feeds(0))
    assert [x.shape for x in results] == [(0, 72), (0, 72)]


@pytest.mark.parametrize(("name", "shape", "text"), [
    ("hidden", (26, 2, 20), r"hidden has shape \[26, 2, 20\] where \[any, any\] is needed"),
    ("hidden", (25, 40), r"hidden has shape \[25, 40\] where \[26, 40\] is needed"),
    ("router_weight", (32, 48), r"router_weight has shape \[32, 48\] where \[any, 40\] is needed"),
    ("expert_bias", (31,), r"expert_bias has shape \[31\] where \[32\] is needed"),
    ("position_ids", (26,), r"position_ids has shape \[26\] where \[any, any\] is needed"),
    ("top_p", (2,), r"top_p has shape \[2\] where \[1\] is needed"),
])
def test_wrong_shapes_of_a_router_are_refused(name, shape, text):
    feeds = router_feeds(FP16)
    feeds[name] = np.zeros(shape, feeds[name].dtype)
    with pytest.raises(Exception, match=f"DmoeRouter: {text}"):
        session(one_node(router.SCHEMA, TensorProto.FLOAT16, KINDS, **routing())).run(None, feeds)


@pytest.mark.parametrize(("feeds", "text"), [
    (add_norm_feeds() | {"delta": np.zeros((4, 72), np.float32)},
     r"delta has shape \[4, 72\] where \[5, 72\] is needed"),
    (add_norm_feeds() | {"weight": np.zeros(64, np.float32)}, r"weight has shape \[64\] where \[72\] is needed"),
    (add_norm_feeds(hidden=12), "a size is outside the kernel's limits"),
])
def test_wrong_shapes_of_an_add_norm_are_refused(feeds, text):
    with pytest.raises(Exception, match=f"DmoeAddNorm: {text}"):
        session(one_node(add_norm.SCHEMA, TensorProto.FLOAT16, eps=1e-5)).run(None, feeds)


@pytest.mark.parametrize(("changes", "text"), [
    ({"mode": "best"}, "DmoeRouter: mode is 'best' where 'token', 'top_p' or 'top_c' is needed"),
    ({"score_function": "relu"}, "DmoeRouter: score_function is 'relu' where 'sigmoid' or 'softmax' is needed"),
    ({"block_length": 1 << 40}, "DmoeRouter: attribute block_length is 1099511627776, not an int32"),
])
def test_wrong_attributes_are_refused_when_it_is_loaded(changes, text):
    with pytest.raises(Exception, match=text):
        session(one_node(router.SCHEMA, TensorProto.FLOAT16, KINDS, **routing(**changes)))
    with pytest.raises(Exception, match="eps"):
        session(one_node(add_norm.SCHEMA, TensorProto.FLOAT16))
