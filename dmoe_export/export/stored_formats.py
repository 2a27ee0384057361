"""A traced graph's weights in the types they are stored in: the nodes that read them know how."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from ..description import Precision
from ..ops import linear
from ..ops.schema import DOMAIN
from ..weight_formats import ExpertQuantisation, WeightFormats

_TYPES = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
_EMBEDDING = "embed.weight"


def store_weights(model: ir.Model, formats: WeightFormats, compute: Precision) -> None:
    """Give every weight of a graph that was traced in the compute type its stored type.

    Requires: linear layers are `DmoeLinear` nodes where a format differs, weights carry no data. Ensures: linear layers
    of integers are `DmoeQuantisedLinear`, rows of the embedding become the compute type when they are read.
    """
    for name, value in list(model.graph.initializers.items()):
        shape = value.shape
        if value.const_value is not None or shape is None or len(shape) < 2 or value.dtype == ir.DataType.UINT8:
            continue  # constants, norms and biases; experts are traced as integers
        if len(shape) == 3:
            if formats.experts in _TYPES and not name.endswith("_scales"):
                value.dtype = _TYPES[formats.experts]
            continue
        rows, inner = (int(size) for size in shape)
        stored = formats.of(name, inner, compute)
        how, users = formats.quantisation(stored), tuple(value.uses())
        scales = None
        if how:
            value.dtype, value.shape = ir.DataType.UINT8, ir.Shape((rows, inner * how.bits // 8))
            scales = ir.Value(name=f"{name}_scales", type=ir.TensorType(_TYPES[compute]),
                              shape=ir.Shape((rows, inner // how.group_size)))
            model.graph.initializers.add(scales)  # without data yet
        elif stored != compute:
            value.dtype = _TYPES[stored]
        for node, _ in users:
            if node.op_type == "Gather" and (scales or stored != compute):
                _widen_rows(node, scales, how, inner, _TYPES[compute])
            elif scales and how:
                _quantise(node, scales, how, rows, inner)
            elif stored != compute and node.domain == "":  # a product with the table itself; ours take narrow weights
                _widen(node, value, _TYPES[compute])


def _widen(node: ir.Node, weight: ir.Value, compute: ir.DataType) -> None:
    """A node's weight, cast to the compute type."""
    cast = ir.node("Cast", [weight], {"to": compute}, name=f"{node.name}.wide", outputs=[
        ir.Value(name=f"{node.name}.wide", type=ir.TensorType(compute), shape=weight.shape)])
    assert isinstance(node.graph, ir.Graph)
    node.graph.insert_before(node, cast)
    node.replace_input_with(list(node.inputs).index(weight), cast.outputs[0])


def _quantise(node: ir.Node, scales: ir.Value, how: ExpertQuantisation, rows: int, inner: int) -> None:
    """A `DmoeLinear` node with integers."""
    assert (node.domain, node.op_type) == (DOMAIN, linear.SCHEMA.name), node.op_type
    inputs = [*node.inputs[:2], scales, *node.inputs[2:]]
    attributes = {**how.model_dump(), "in_features": inner, "out_features": rows}
    quantised = ir.node(linear.QUANTISED_SCHEMA.name, inputs, attributes, domain=DOMAIN, name=node.name,
                        outputs=[ir.Value(name=None)])
    _replace(node, [quantised])


def _widen_rows(gather: ir.Node, scales: ir.Value | None, how: ExpertQuantisation | None, inner: int,
                compute: ir.DataType) -> None:
    """Rows of the embedding in the compute type: cast, or dequantised by standard ops, bit for bit as `dequantise`."""
    table, ids = gather.inputs[:2]
    nodes: list[ir.Node] = []

    def add(op: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        nodes.append(ir.node(op, list(inputs), attributes, name=f"embed.rows_{len(nodes)}",
                             outputs=[ir.Value(name=f"embed.rows_{len(nodes)}")]))
        return nodes[-1].outputs[0]

    def constant(name: str, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(name=f"embed.{name}", type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape),
                         const_value=tensor)
        assert gather.graph is not None
        gather.graph.register_initializer(value)
        return value

    def integers(name: str, *values: int) -> ir.Value:
        return constant(name, ir.tensor(list(values), ir.DataType.INT64, name=f"embed.{name}"))

    rows = add("Gather", table, ids, axis=0)
    if how is None or scales is None:
        add("Cast", rows, to=compute)
    else:
        groups = integers("groups", -1, inner // how.group_size, how.group_size)
        if how.bits == 4:  # two to a byte, the even index low
            low = add("BitwiseAnd", rows, constant("nibble", ir.tensor([15], ir.DataType.UINT8, name="embed.nibble")))
            high = add("BitShift", rows, constant("four", ir.tensor([4], ir.DataType.UINT8, name="embed.four")),
                       direction="RIGHT")
            last = integers("last", -1)
            rows = add("Concat", add("Unsqueeze", low, last), add("Unsqueeze", high, last), axis=-1)
        stored = add("Cast", add("Reshape", rows, groups), to=compute)
        offset = constant("offset", ir.tensor([float(1 << (how.bits - 1))], compute, name="embed.offset"))
        per_group = add("Unsqueeze", add("Gather", scales, ids, axis=0), integers("last_axis", -1))
        values = add("Mul", add("Sub", stored, offset), per_group)
        add("Reshape", values, integers("row", -1, inner))
    _replace(gather, nodes)


def _replace(node: ir.Node, nodes: list[ir.Node]) -> None:
    """`nodes` in the place of a node of one output, which keeps its name, type and shape; the last one makes it."""
    old, new, graph = node.outputs[0], nodes[-1].outputs[0], node.graph
    assert isinstance(graph, ir.Graph)
    name, new.type, new.shape = old.name, old.type, old.shape
    graph.insert_after(node, nodes)
    for user, index in tuple(old.uses()):
        if user not in nodes:
            user.replace_input_with(index, new)
    graph.remove(node, safe=True)
    new.name = name
