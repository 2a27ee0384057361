"""ONNX bodies of `DmoeLinear` and `DmoeQuantisedLinear`: `Gemm` and `MatMulNBits`, which may leave their bias out, too.

TensorRT's parser takes no function with an input left out: so where no layer of a graph has a bias, the body has none.
"""

from __future__ import annotations

import onnx
import onnx.parser
from onnx import helper

from ..schema import DOMAIN, OPSET, int64s
from . import QUANTISED_SCHEMA, SCHEMA


def linear_body(bias: bool = True, narrow: bool = False) -> onnx.FunctionProto:
    """The function body, of any sizes and types; with `bias`, nodes may have one or not.

    `narrow`: w may be of another type than x. ONNX Runtime casts a constant w once, when it loads the graph, and keeps
    the result: without our kernels such weights take the memory that float32 takes.
    """
    inputs = ", ".join(SCHEMA.inputs if bias else SCHEMA.inputs[:2])
    if narrow:
        weight, product = "as_x = CastLike (w, x)", inputs.replace("w", "as_x")
    else:
        weight, product = "", inputs
    return onnx.parser.parse_function(f"""
    <opset_import: ["" : {OPSET}], domain: "{DOMAIN}">
    {SCHEMA.name} ({inputs}) => (y)
    {{
      {weight}
      y = Gemm <transB = 1> ({product})
    }}
    """)


def quantised_linear_body() -> onnx.FunctionProto:
    """The function body, of any sizes, bits and groups; nodes may have a bias or not."""
    attributes = ", ".join(QUANTISED_SCHEMA.attributes)
    return onnx.parser.parse_function(f"""
    <opset_import: ["" : {OPSET}, "com.microsoft" : 1], domain: "{DOMAIN}">
    {QUANTISED_SCHEMA.name} <{attributes}> ({", ".join(QUANTISED_SCHEMA.inputs)}) => (y)
    {{
      rows_and_groups = {int64s(0, -1)}
      bits = Constant <value_int: int = @bits> ()
      group = Constant <value_int: int = @group_size> ()
      group_bits = Mul (bits, group)
      bits_of_byte = Constant <value_int = 8> ()
      group_bytes = Div (group_bits, bits_of_byte)
      one_size = {int64s(1)}
      group_bytes_row = Reshape (group_bytes, one_size)
      shape = Concat <axis = 0> (rows_and_groups, group_bytes_row)
      blocks = Reshape (w, shape)
      y = com.microsoft.MatMulNBits <K: int = @in_features, N: int = @out_features, bits: int = @bits,
        block_size: int = @group_size> (x, blocks, scales, , , b)
    }}
    """)


def inline(node: onnx.NodeProto) -> None:
    """Make a node of a graph what its body computes; name, inputs and outputs stay."""
    node.domain, node.op_type = "", "Gemm"
    node.attribute.append(helper.make_attribute("transB", 1))
