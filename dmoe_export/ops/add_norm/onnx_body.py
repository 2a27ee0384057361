"""ONNX body of `DmoeAddNorm`: two standard ops."""

from __future__ import annotations

import onnx
import onnx.parser

from ..schema import DOMAIN, OPSET
from . import SCHEMA


def add_norm_body() -> onnx.FunctionProto:
    """The function body, of any sizes and types."""
    attributes = ", ".join(("plugin_namespace", "plugin_version", *SCHEMA.attributes))
    return onnx.parser.parse_function(f"""
    <opset_import: ["" : {OPSET}], domain: "{DOMAIN}">
    {SCHEMA.name} <{attributes}> ({", ".join(SCHEMA.inputs)}) => ({", ".join(SCHEMA.outputs)})
    {{
      total = Add (x, delta)
      normed = RMSNormalization <axis = -1, epsilon: float = @eps> (total, weight)
    }}
    """)
