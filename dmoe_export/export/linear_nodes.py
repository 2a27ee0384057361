"""Linear layers of a traced graph as `DmoeLinear` nodes."""

from __future__ import annotations

import onnx_ir as ir

from ..ops import linear
from ..ops.schema import DOMAIN

_LINEAR = {"transA": 0, "transB": 1, "alpha": 1.0, "beta": 1.0}  # what a Gemm that is one computes
_DEFAULTS = {**_LINEAR, "transB": 0}


def name_linear_layers(model: ir.Model) -> None:
    """Turn every Gemm that is a linear layer, its weights among the initializers, into a `DmoeLinear` node.

    Names, outputs and their recorded shapes stay; the model still needs the op's body.
    """
    for node in model.graph:
        if node.domain == "" and node.op_type == "Gemm" and _is_linear(node):
            node.domain, node.op_type = DOMAIN, linear.SCHEMA.name
            node.attributes.clear()


def _is_linear(node: ir.Node) -> bool:
    said = _DEFAULTS | {name: attribute.value for name, attribute in node.attributes.items()}
    return said == _LINEAR and all(value is None or value.is_initializer() for value in node.inputs[1:])
