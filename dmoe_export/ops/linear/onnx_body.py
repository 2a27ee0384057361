"""ONNX body of `DmoeLinear`, with and without a bias: `Gemm` may leave its third input out, too."""

from __future__ import annotations

import onnx
import onnx.parser
from onnx import helper

from ..schema import DOMAIN, OPSET
from . import SCHEMA


def linear_body() -> onnx.FunctionProto:
    """The function body, of any sizes and types."""
    x, w, b = SCHEMA.inputs
    return onnx.parser.parse_function(f"""
    <opset_import: ["" : {OPSET}], domain: "{DOMAIN}">
    {SCHEMA.name} ({x}, {w}, {b}) => (y)
    {{
      y = Gemm <transB = 1> ({x}, {w}, {b})
    }}
    """)


def inline(node: onnx.NodeProto) -> None:
    """Make a node of a graph what its body computes; name, inputs and outputs stay."""
    node.domain, node.op_type = "", "Gemm"
    node.attribute.append(helper.make_attribute("transB", 1))
