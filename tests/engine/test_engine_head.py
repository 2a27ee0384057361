"""DmoeHead as a plugin of TensorRT-RTX: parsed, built, and what it refuses while it is built."""

from __future__ import annotations

import pytest
from fused_models import one_node
from one_node_engines import built_plugin
from onnx import TensorProto

from dmoe_export.engine.plugins import find_library
from dmoe_export.ops.head import SCHEMA

pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed (pip install '.[rtx]')")

SHAPES = {"hidden": ["N", 64], "norm": [64], "weight": [300, 64], "logit_rows": ["B", "M"], "logits_kept": ["L"]}
SIZES = {"N": (1, 32, 512), "B": (1, 1, 4), "M": (1, 32, 128), "L": (1, 1, 128)}


@pytest.mark.parametrize("half", [TensorProto.FLOAT16, TensorProto.BFLOAT16], ids=["fp16", "bf16"])
def test_it_is_a_plugin(half, tmp_path):
    model = one_node(SCHEMA, half, shapes=SHAPES, eps=1e-6, mask_id=7)
    plugin = built_plugin(model, SHAPES, SIZES, tmp_path)
    assert plugin.op == "DmoeHead"
    assert plugin.attributes == {"eps": pytest.approx(1e-6), "mask_id": 7, "dmoe_build": find_library().build}


@pytest.mark.parametrize(("changed", "text"), [
    ({"norm": [63]}, "DmoeHead: norm has 63 values and weight rows of 64 where hidden has 64"),
    ({"weight": [300, 72]}, "DmoeHead: norm has 64 values and weight rows of 72 where hidden has 64"),
    ({"hidden": ["N", 60], "norm": [60], "weight": [300, 60]}, "DmoeHead: a size is outside the kernel's limits"),
])
def test_sizes_that_do_not_fit_are_refused(changed, text, tmp_path):
    shapes = SHAPES | changed
    model = one_node(SCHEMA, TensorProto.FLOAT16, shapes=shapes, eps=1e-6, mask_id=7)
    with pytest.raises(AssertionError, match=text):
        built_plugin(model, shapes, SIZES, tmp_path)


@pytest.mark.parametrize(("attributes", "text"), [
    ({"eps": 1e-6}, "DmoeHead: attribute mask_id is missing or has another type"),
    ({"eps": 1, "mask_id": 7}, "DmoeHead: attribute eps is missing or has another type"),
])
def test_attributes_that_do_not_fit_are_refused(attributes, text, tmp_path):
    with pytest.raises(AssertionError, match=text):
        built_plugin(one_node(SCHEMA, TensorProto.FLOAT16, shapes=SHAPES, **attributes), SHAPES, SIZES, tmp_path)
