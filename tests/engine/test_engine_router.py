"""DmoeRouter and DmoeAddNorm as plugins of TensorRT-RTX: parsed, built, and what they refuse while they are built."""

from __future__ import annotations

import pytest
from fused_models import one_node
from one_node_engines import built_plugin
from onnx import TensorProto

from dmoe_export.engine.plugins import find_library
from dmoe_export.ops import add_norm, router
from dmoe_export.ops.block_route.attributes import RouteAttributes

pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed (pip install '.[rtx]')")

HALVES = pytest.mark.parametrize("half", [TensorProto.FLOAT16, TensorProto.BFLOAT16], ids=["fp16", "bf16"])
F32, I64 = TensorProto.FLOAT, TensorProto.INT64
KINDS = {"router_weight": F32, "expert_bias": F32, "position_ids": I64, "top_p": F32, "min_experts": I64,
         "coreset_size": I64, "router_logits": F32}
SHAPES = {"hidden": ["N", 64], "router_weight": [32, 64], "expert_bias": [32], "position_ids": ["B", "T"], "top_p": [1],
          "min_experts": [1], "coreset_size": [1]}
SIZES = {"N": (1, 32, 512), "B": (1, 1, 4), "T": (1, 32, 128)}
ROUTING = {name: value for name, value in RouteAttributes("top_p", 8, 4, 4, 2, 2.5).node_attributes().items()
           if not name.startswith("plugin_")}
NORM_SHAPES = {"x": ["N", 64], "delta": ["N", 64], "weight": [64]}


@HALVES
def test_the_router_is_a_plugin(half, tmp_path):
    model = one_node(router.SCHEMA, half, KINDS, SHAPES, **ROUTING)
    plugin = built_plugin(model, SHAPES, SIZES, tmp_path)
    assert plugin.op == "DmoeRouter"
    assert plugin.attributes == ROUTING | {"dmoe_build": find_library().build}


@HALVES
def test_add_norm_is_a_plugin(half, tmp_path):
    plugin = built_plugin(one_node(add_norm.SCHEMA, half, None, NORM_SHAPES, eps=1e-5), NORM_SHAPES, SIZES, tmp_path)
    assert plugin.op == "DmoeAddNorm"
    assert plugin.attributes == {"eps": pytest.approx(1e-5), "dmoe_build": find_library().build}


@pytest.mark.parametrize(("changed", "text"), [
    ({"router_weight": [32, 72]}, "DmoeRouter: router_weight has rows of 72 where hidden has 64"),
    ({"expert_bias": [31]}, "DmoeRouter: expert_bias has 31 values where router_weight has 32 experts"),
    ({"top_p": [2]}, r"DmoeRouter: top_p must be one number, of shape \[1\]"),
    ({"hidden": ["N", 60], "router_weight": [32, 60]}, "DmoeRouter: a size is outside the kernel's limits"),
    ({"router_weight": [30, 64], "expert_bias": [30]}, "DmoeRouter: an attribute does not fit"),
])
def test_sizes_that_a_router_does_not_take_are_refused(changed, text, tmp_path):
    shapes = SHAPES | changed
    with pytest.raises(AssertionError, match=text):
        built_plugin(one_node(router.SCHEMA, TensorProto.FLOAT16, KINDS, shapes, **ROUTING), shapes, SIZES, tmp_path)


@pytest.mark.parametrize(("changed", "text"), [
    ({"weight": [63]}, "DmoeAddNorm: delta has shape .* and weight 63 values where x has shape"),
    ({"x": ["N", 60], "delta": ["N", 60], "weight": [60]}, "DmoeAddNorm: the hidden size 60 must be a multiple of 8"),
])
def test_sizes_that_an_add_norm_does_not_take_are_refused(changed, text, tmp_path):
    shapes = NORM_SHAPES | changed
    with pytest.raises(AssertionError, match=text):
        built_plugin(one_node(add_norm.SCHEMA, TensorProto.FLOAT16, None, shapes, eps=1e-5), shapes, SIZES, tmp_path)


def test_attributes_that_do_not_fit_are_refused(tmp_path):
    for changed, text in (({"mode": "best"}, "DmoeRouter: mode 'best' or score function 'sigmoid' is not known"),
                          ({"num_groups": 4.0}, "DmoeRouter: attribute num_groups is missing or has another type")):
        with pytest.raises(AssertionError, match=text):
            model = one_node(router.SCHEMA, TensorProto.FLOAT16, KINDS, SHAPES, **ROUTING | changed)
            built_plugin(model, SHAPES, SIZES, tmp_path)
    with pytest.raises(AssertionError, match="DmoeAddNorm: attribute eps is missing or has another type"):
        built_plugin(one_node(add_norm.SCHEMA, TensorProto.FLOAT16, None, NORM_SHAPES), NORM_SHAPES, SIZES, tmp_path)
