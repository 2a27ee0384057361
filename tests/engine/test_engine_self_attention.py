"""DmoeSelfAttention as a plugin of TensorRT-RTX: parsed, built, and what it refuses while it is built."""

from __future__ import annotations

import pytest
from fused_models import one_node
from one_node_engines import built_plugin
from onnx import TensorProto

from dmoe_export.engine.plugins import find_library
from dmoe_export.ops.self_attention import NORMED_SCHEMA, SCHEMA

pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed (pip install '.[rtx]')")

KINDS = {"cos": TensorProto.FLOAT, "sin": TensorProto.FLOAT, "position_ids": TensorProto.INT64,
         "past_positions": TensorProto.INT64}
PLAIN = {"qkv": ["N", 8 * 64], "cos": ["B", "T", 1, 16], "sin": ["B", "T", 1, 16], "position_ids": ["B", "T"],
         "past_positions": ["B", "S"], "past_key": ["B", 2, "S", 64], "past_value": ["B", 2, "S", 64]}
NORMS = {"q_norm": [64], "k_norm": [64]}
SIZES = {"B": (1, 1, 4), "T": (1, 32, 512), "N": (1, 32, 2048), "S": (1, 256, 4096)}
ATTRIBUTES = {"block_length": 32, "eps": 1e-6}


def _build(shapes, folder, half=TensorProto.FLOAT16, **attributes):
    schema = NORMED_SCHEMA if "q_norm" in shapes else SCHEMA
    chosen = {"head_norm": int("q_norm" in shapes), **ATTRIBUTES, **attributes}
    return built_plugin(one_node(schema, half, KINDS, shapes, **chosen), shapes, SIZES, folder)


@pytest.mark.parametrize(("half", "norms"), [(TensorProto.FLOAT16, {}), (TensorProto.BFLOAT16, NORMS)],
                         ids=["fp16", "bf16_norms"])
def test_it_is_a_plugin(half, norms, tmp_path):
    plugin = _build(PLAIN | norms, tmp_path, half)
    assert plugin.op == "DmoeSelfAttention"
    assert plugin.attributes == {"block_length": 32, "eps": pytest.approx(1e-6), "head_norm": int(bool(norms)),
                                 "dmoe_build": find_library().build}


@pytest.mark.parametrize(("changed", "text"), [
    ({"past_value": ["B", 2, "S", 32]}, r"DmoeSelfAttention: past_value has shape \[4, 2, 4096, 32\] where "
                                        r"\[4, 2, 4096, 64\] is needed"),
    ({"q_norm": [32]}, r"DmoeSelfAttention: q_norm has shape \[32\] where \[64\] is needed"),
    ({"qkv": ["N", 500]}, "DmoeSelfAttention: qkv has rows of 500 where a multiple of the head dimension 64 is needed"),
    ({"qkv": ["N", 7 * 64]}, "DmoeSelfAttention: a size is outside the kernel's limits"),
])
def test_sizes_that_do_not_fit_are_refused(changed, text, tmp_path):
    with pytest.raises(AssertionError, match=text):
        _build(PLAIN | NORMS | changed, tmp_path)


@pytest.mark.parametrize(("shapes", "attributes", "text"), [
    (PLAIN, {"head_norm": 1}, "DmoeSelfAttention: 7 inputs where head_norm asks for 9"),
    (PLAIN, {"head_norm": 2}, "DmoeSelfAttention: attribute head_norm is 2, it must be 0 or 1"),
    (PLAIN, {"block_length": -1}, "DmoeSelfAttention: attribute block_length is -1, it must be 0"),
    (PLAIN, {"eps": 0.0}, "DmoeSelfAttention: attribute eps is 0.000000, it must be above 0"),
    (PLAIN, {"eps": 1}, "DmoeSelfAttention: attribute eps is missing or has another type"),
])
def test_attributes_that_do_not_fit_are_refused(shapes, attributes, text, tmp_path):
    with pytest.raises(AssertionError, match=text):
        _build(shapes, tmp_path, **attributes)
