"""Slot pools of DmoeMixture nodes: the order in which the plugin takes its inputs, scales or none."""

from __future__ import annotations

import pytest
from onnx import TensorProto, helper

from dmoe_export.bundle.engine_entries import WeightInput
from dmoe_export.engine.resident import SLOTS, add_pools
from dmoe_export.ops import experts, mixture

ROUTED = {"gate_up": [4, 48, 16], "down": [4, 16, 24]}
SCALES = {"gate_up_scales": [4, 48, 1], "down_scales": [4, 16, 1]}


def _model(schema, sizes):
    """One node whose routed weights are inputs, as `network.py` leaves them."""
    prefix = "layers.1.ffn."
    names = [prefix + name if name in sizes or name.startswith("shared") else name for name in schema.inputs]
    inputs = [helper.make_tensor_value_info(prefix + name, TensorProto.INT8 if name in ROUTED and len(sizes) == 4
                                            else TensorProto.FLOAT16, shape) for name, shape in sizes.items()]
    node = helper.make_node(schema.name, names, ["mixed"], domain="dmoe")
    weights = [WeightInput(name=prefix + name, file="experts.bin", offset=0, bytes=1, dtype="float16", shape=shape)
               for name, shape in sizes.items()]
    return helper.make_model(helper.make_graph([node], "g", inputs, [])), weights, names


@pytest.mark.parametrize("schema", [experts.SCHEMA, experts.QUANTISED_SCHEMA, mixture.SCHEMA, mixture.QUANTISED_SCHEMA],
                         ids=["experts", "experts-quantised", "mixture", "mixture-quantised"])
def test_table_and_pools_come_behind_all_weights(schema):
    sizes = ROUTED | (SCALES if "gate_up_scales" in schema.inputs else {})
    model, weights, names = _model(schema, sizes)
    (pool,) = add_pools(model, weights)
    (node,) = model.graph.node
    slots = [f"layers.1.ffn.{name}.pool" for name in sizes]
    assert list(node.input) == [*names, "layers.1.ffn.slot_of_expert", *slots]
    assert [weight for weight, _ in pool.pairs] == [f"layers.1.ffn.{name}" for name in sizes]
    assert not any("shared" in name for pair in pool.pairs for name in pair)
    added = {entry.name: entry.type.tensor_type for entry in model.graph.input[len(sizes):]}
    assert list(added) == ["layers.1.ffn.slot_of_expert", *slots]
    assert added["layers.1.ffn.slot_of_expert"].elem_type == TensorProto.INT32
    assert added["layers.1.ffn.slot_of_expert"].shape.dim[0].dim_value == 4
    for name, shape in sizes.items():
        dims = added[f"layers.1.ffn.{name}.pool"].shape.dim
        assert (dims[0].dim_param, [dim.dim_value for dim in dims[1:]]) == (SLOTS, shape[1:])
    assert [(a.name, a.i) for a in node.attribute] == [("residency", 1)]
