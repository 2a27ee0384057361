"""Linear layers of a graph as an op of our CPU kernels, which reads their weights as they lie in the file."""

from __future__ import annotations

import struct
from collections.abc import Mapping

from ...ops.schema import DOMAIN
from .protobuf import field, fields, varint

LINEAR = "DmoeLinear"  # plugins/cpu/op_linear.cpp

# Field numbers in onnx.proto.
_MODEL_GRAPH, _MODEL_OPSETS, _OPSET_DOMAIN, _OPSET_VERSION = 7, 8, 1, 2
_GRAPH_NODES, _GRAPH_INITIALIZERS = 1, 5
_TENSOR_SIZES, _TENSOR_TYPE, _TENSOR_NAME = 1, 2, 8
_INPUT, _OP, _ATTRIBUTE, _DOMAIN = 1, 4, 5, 7
_NAME, _REAL, _INTEGER = 1, 2, 3  # of an attribute

_GEMM = {b"transA": 0.0, b"transB": 0.0, b"alpha": 1.0, b"beta": 1.0}  # unless a node says otherwise
_FLOAT, _HALF = 1, 10


def with_linear(model: bytes) -> bytes:
    """A serialised ModelProto with DmoeLinear wherever Gemm is a linear layer; ValueError if it is no model.

    That is y = x · Wᵀ (+ b) in float32 or float16, W and b among the initializers: transB and nothing else of Gemm.
    """
    parts, imported, changed = [], False, False
    for number, content, whole in fields(model):
        if number == _MODEL_GRAPH:
            graph = _graph(content)
            changed, whole = graph != content, field(_MODEL_GRAPH, graph)
        elif number == _MODEL_OPSETS:
            imported |= (_OPSET_DOMAIN, DOMAIN.encode()) in [(inner, value) for inner, value, _ in fields(content)]
        parts.append(whole)
    if not changed:
        return model
    if not imported:
        parts.append(field(_MODEL_OPSETS, field(_OPSET_DOMAIN, DOMAIN.encode()) + field(_OPSET_VERSION, 1)))
    return b"".join(parts)


def _graph(graph: bytes) -> bytes:
    axes = dict(_axes(tensor) for number, tensor, _ in fields(graph) if number == _GRAPH_INITIALIZERS)
    return b"".join(field(_GRAPH_NODES, _as_linear(content)) if number == _GRAPH_NODES and _is_linear(content, axes)
                    else whole for number, content, whole in fields(graph))


def _axes(tensor: bytes) -> tuple[bytes, int]:
    """Name and number of axes of an initializer; −1 unless it is in float32 or float16."""
    axes, kind, name = 0, 0, b""
    for number, content, _ in fields(tensor):
        if number == _TENSOR_SIZES:
            axes += sum(byte < 0x80 for byte in content)  # integers end so: one, or packed ones
        elif number == _TENSOR_TYPE:
            kind = varint(content)[0]
        elif number == _TENSOR_NAME:
            name = content
    return name, axes if kind in (_FLOAT, _HALF) else -1


def _is_linear(node: bytes, axes: Mapping[bytes, int]) -> bool:
    inputs, attributes, kind = [], dict(_GEMM), {_OP: b"", _DOMAIN: b""}
    for number, content, _ in fields(node):
        if number == _INPUT:
            inputs.append(content)
        elif number == _ATTRIBUTE:
            attributes |= _attribute(content)
        elif number in kind:
            kind[number] = content
    return (kind == {_OP: b"Gemm", _DOMAIN: b""} and attributes == _GEMM | {b"transB": 1.0}
            and [axes.get(name) for name in inputs[1:]] in ([2], [2, 1]))


def _attribute(attribute: bytes) -> dict[bytes, float]:
    """Name and value of an attribute that is a number."""
    name, value = b"", 0.0
    for number, content, _ in fields(attribute):
        if number == _NAME:
            name = content
        elif number == _REAL:
            value, = struct.unpack("<f", content)
        elif number == _INTEGER:
            value = float(varint(content)[0])
    return {name: value}


def _as_linear(node: bytes) -> bytes:
    kept = b"".join(whole for number, _, whole in fields(node) if number not in (_OP, _DOMAIN, _ATTRIBUTE))
    return kept + field(_OP, LINEAR.encode()) + field(_DOMAIN, DOMAIN.encode())
