"""Experts in a slot pool: the nodes of a graph get a table and a pool as inputs beside all their weights.

Ensures: every node of routed experts has all inputs of its plugin (README.md of plugins/tensorrt/experts and mixture).
The number of slots is one open dimension, P, so that the budget is chosen when the engine is opened.
"""

from __future__ import annotations

from onnx import ModelProto, NodeProto, TensorProto, helper

from ..bundle.engine_entries import ExpertPool, WeightInput
from ..ops import experts, mixture
from .plugins import EXPERTS_OPS
from .settings import SLOTS


def add_pools(model: ModelProto, weights: list[WeightInput]) -> list[ExpertPool]:
    """Add the inputs to a graph whose experts are already inputs; one entry per MoE layer, in their order."""
    shapes = {weight.name: weight.shape for weight in weights}
    types = {entry.name: entry.type.tensor_type.elem_type for entry in model.graph.input}
    pools = []
    for node in model.graph.node:
        if node.op_type not in EXPERTS_OPS:
            continue
        names = routed_weights(node)
        pool = ExpertPool(slot_of_expert=names["gate_up"].removesuffix("gate_up") + "slot_of_expert", **names,
                          **{f"{kind}_pool": f"{name}.pool" for kind, name in names.items()})
        added: list[tuple[str, int, list[int | str]]] = [
            (pool.slot_of_expert, TensorProto.INT32, [shapes[pool.gate_up][0]])]
        added += [(name, types[weight], [SLOTS, *shapes[weight][1:]]) for weight, name in pool.pairs]
        for name, kind, shape in added:
            model.graph.input.append(helper.make_tensor_value_info(name, kind, shape))
            node.input.append(name)
        node.attribute.append(helper.make_attribute("residency", 1))
        pools.append(pool)
    return pools


def routed_weights(node: NodeProto) -> dict[str, str]:
    """Inputs of a node that have a slice per routed expert, by kind; the shared expert's weights come behind them."""
    shared = len(mixture.SCHEMA.inputs) - len(experts.SCHEMA.inputs) if node.op_type == mixture.SCHEMA.name else 0
    given = node.input[3:len(node.input) - shared]
    return dict(zip(("gate_up", "down", "gate_up_scales", "down_scales"), given, strict=False))  # scales or none
