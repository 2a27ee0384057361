"""ONNX body of `DmoeLinear`: `Gemm`, which may leave its third input out, too.

TensorRT's parser takes no function with an input left out: so where no layer of a graph has a bias, the body has none.
"""

from __future__ import annotations

import onnx
import onnx.parser
from onnx import helper

from ..schema import DOMAIN, OPSET
from . import SCHEMA


def linear_body(bias: bool = True) -> onnx.FunctionProto:
    """The function body, of any sizes and types; with `bias`, nodes may have one or not."""
    inputs = ", ".join(SCHEMA.inputs if bias else SCHEMA.inputs[:2])
    return onnx.parser.parse_function(f"""
    <opset_import: ["" : {OPSET}], domain: "{DOMAIN}">
    {SCHEMA.name} ({inputs}) => (y)
    {{
      y = Gemm <transB = 1> ({inputs})
    }}
    """)


def inline(node: onnx.NodeProto) -> None:
    """Make a node of a graph what its body computes; name, inputs and outputs stay."""
    node.domain, node.op_type = "", "Gemm"
    node.attribute.append(helper.make_attribute("transB", 1))
