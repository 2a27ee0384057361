"""DmoeMixture as a plugin of TensorRT-RTX in each form: parsed, built, and what it refuses while it is built."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fused_models import one_node
from one_node_engines import built_plugin
from onnx import TensorProto

from dmoe_export.engine.plugins import find_library
from dmoe_export.ops.mixture import QUANTISED_SCHEMA, SCHEMA

pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed (pip install '.[rtx]')")

FLOATS = {"hidden": ["N", 64], "expert_ids": ["N", 2], "expert_weights": ["N", 2], "gate_up": [4, 64, 64],
          "down": [4, 64, 32], "shared_gate_up": [80, 64], "shared_down": [64, 40]}
INTEGERS = FLOATS | {"gate_up": [4, 64, 32], "down": [4, 64, 16],
                     "gate_up_scales": [4, 64, 2], "down_scales": [4, 64, 1]}
POOLED = ("gate_up", "down", "gate_up_scales", "down_scales")
SIZES = {"N": (1, 32, 512), "P": (1, 2, 4)}
QUANTISED = {"bits": 4, "group_size": 32, "layout": 2}
BYTES = TensorProto.INT8  # of unsigned integers, as network.py calls them


def build(quantised, resident, folder, half=TensorProto.FLOAT16, changed=None, **attributes):
    """The plugin of one node; `changed`: other shapes of inputs."""
    schema, shapes = (QUANTISED_SCHEMA, INTEGERS) if quantised else (SCHEMA, FLOATS)
    kinds = {"gate_up": BYTES, "down": BYTES} if quantised else {}
    attributes = (QUANTISED if quantised else {}) | attributes
    if resident:
        pools = {f"{name}_pool": ["P", *shapes[name][1:]] for name in POOLED if name in shapes}
        schema = replace(schema, inputs=(*schema.inputs, "slot_of_expert", *pools))
        shapes = shapes | {"slot_of_expert": [4]} | pools
        kinds = {name + end: kind for name, kind in kinds.items() for end in ("", "_pool")}
        kinds["slot_of_expert"] = TensorProto.INT32
        attributes["residency"] = 1
    shapes = shapes | (changed or {})
    return built_plugin(one_node(schema, half, kinds, shapes, **attributes), shapes, SIZES, folder)


@pytest.mark.parametrize("resident", [False, True], ids=["all", "pool"])
@pytest.mark.parametrize("quantised", [False, True], ids=["16 bits", "4 bits"])
def test_it_is_a_plugin(quantised, resident, tmp_path):
    half = TensorProto.BFLOAT16 if resident else TensorProto.FLOAT16
    plugin = build(quantised, resident, tmp_path, half)
    attributes = (QUANTISED if quantised else {}) | ({"residency": 1} if resident else {})
    assert (plugin.op, plugin.attributes) == ("DmoeMixture", {**attributes, "dmoe_build": find_library().build})


@pytest.mark.parametrize("quantised", [False, True], ids=["16 bits", "4 bits"])
def test_it_keeps_the_activation_that_is_not_usual(quantised, tmp_path):
    usual = build(quantised, False, tmp_path, activation="silu")
    assert "activation" not in usual.attributes, "as engines from before the attribute"
    assert build(quantised, False, tmp_path, activation="gelu_tanh").attributes["activation"] == "gelu_tanh"


@pytest.mark.parametrize(("quantised", "changed", "text"), [
    (False, {"shared_gate_up": [82, 64]}, r"shared_gate_up has shape \[82, 64\] where \[80, 64\] is needed"),
    (False, {"shared_down": [63, 40]}, r"shared_down has shape \[63, 40\] where \[64, 40\] is needed"),
    (False, {"shared_down": [64]}, r"shared_down has shape \[64\] where \[64, 0\] is needed"),
    (False, {"down": [4, 63, 32]}, r"down has shape \[4, 63, 32\] where \[4, 64, 32\] is needed"),
    (True, {"shared_gate_up": [80, 32]}, r"shared_gate_up has shape \[80, 32\] where \[80, 64\] is needed"),
    (True, {"down_scales": [4, 64, 2]}, r"down_scales has shape \[4, 64, 2\] where \[4, 64, 1\] is needed"),
    (False, {"shared_gate_up": [72, 64], "shared_down": [64, 36]}, "a size is outside the kernel's limits"),
])
def test_sizes_that_do_not_fit_are_refused(quantised, changed, text, tmp_path):
    with pytest.raises(AssertionError, match=f"DmoeMixture: {text}"):
        build(quantised, False, tmp_path, changed=changed)


def test_a_pool_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(AssertionError, match=r"DmoeMixture: down_pool has shape \[4, 64, 24\] where \[4, 64, 32\]"):
        build(False, True, tmp_path, changed={"down_pool": ["P", 64, 24]})


@pytest.mark.parametrize(("attributes", "text"), [
    ({"bits": 3, "group_size": 32}, "attribute bits is 3, it must be 4, 8 or 16"),
    ({"bits": 4, "group_size": 48}, "attribute group_size is 48, it must be 32, 64 or 128"),
    ({"activation": "relu"}, "attribute activation is 'relu', it must be 'silu' or 'gelu_tanh'"),
    ({"activation": 1}, "attribute activation is missing or has another type"),
    ({"layout": 1}, r"attribute layout is 1, it must be 2 \(integers in fragment order\)"),
])
def test_attributes_that_do_not_fit_are_refused(attributes, text, tmp_path):
    with pytest.raises(AssertionError, match=f"DmoeMixture: {text}"):
        build(True, False, tmp_path, **attributes)
