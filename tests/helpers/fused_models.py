"""ONNX models of one fused node, for the libraries of custom ops and for TensorRT's parser."""

from __future__ import annotations

from collections.abc import Iterable

from onnx import TensorProto, helper

from dmoe_export.ops.schema import DOMAIN, OPSET, OpSchema

_INTEGERS = {"expert_ids": TensorProto.INT32, "logit_rows": TensorProto.INT64, "logits_kept": TensorProto.INT64,
             "token_ids": TensorProto.INT64}
_FLOATS = {"expert_weights", "confidence", "logits"}  # float32 whatever the hidden state is


def one_node(schema: OpSchema, half: int, kinds: dict[str, int] | None = None,
             shapes: dict[str, list[int | str]] | None = None, without: tuple[str, ...] = (), **attributes) -> bytes:
    """A model of float32 inputs and outputs around a node of `half`, because numpy has no bf16.

    `kinds`: other types of inputs, which are not cast. Without `shapes` of the inputs no sizes are said, so that wrong
    ones reach the op. `without`: outputs that the graph leaves out.
    """
    kinds = {**_INTEGERS, **(kinds or {})}
    nodes, inputs, names, outputs = [], [], [], []
    for name in schema.inputs:
        cast = name not in kinds and name not in _FLOATS
        if cast:
            nodes.append(helper.make_node("Cast", [name], [f"{name}_half"], to=half))
        names.append(f"{name}_half" if cast else name)
        inputs.append(_value(name, kinds, (shapes or {}).get(name)))
    results = ["" if name in without else name if name in kinds or name in _FLOATS else f"{name}_half"
               for name in schema.outputs]
    nodes.append(helper.make_node(schema.name, names, results, domain=DOMAIN, **schema.plugin_attributes, **attributes))
    for name, result in zip(schema.outputs, results, strict=True):
        if name in without:
            continue
        if name != result:
            nodes.append(helper.make_node("Cast", [result], [name], to=TensorProto.FLOAT))
        outputs.append(_value(name, kinds))
    return model(nodes, inputs, outputs)


def _value(name: str, kinds: dict[str, int], shape: list[int | str] | None = None):
    return helper.make_tensor_value_info(name, kinds.get(name, TensorProto.FLOAT), shape)


def model(nodes: Iterable, inputs: Iterable, outputs: Iterable) -> bytes:
    """Nodes as an ONNX model with our ops' domain."""
    graph = helper.make_graph(list(nodes), "one_node", list(inputs), list(outputs))
    return helper.make_model(graph, ir_version=10, opset_imports=[
        helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]).SerializeToString()
