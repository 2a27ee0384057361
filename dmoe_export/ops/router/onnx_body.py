"""ONNX body of `DmoeRouter`: a linear layer and `DmoeBlockRoute`."""

from __future__ import annotations

import onnx
import onnx.parser

from ..block_route import SCHEMA as ROUTE
from ..schema import DOMAIN, OPSET, int64s
from . import SCHEMA

_STRINGS = ("mode", "score_function")
_FLOATS = ("routed_scaling",)


def router_body(num_experts: int, experts_per_token: int, linear: str, wide: bool) -> onnx.FunctionProto:
    """The function body; `linear`: the node of a linear layer, `wide`: the hidden state is float32."""
    attributes = ", ".join(("plugin_namespace", "plugin_version", *SCHEMA.attributes))
    kinds = {name: "string" if name in _STRINGS else "float" if name in _FLOATS else "int" for name in ROUTE.attributes}
    passed = ", ".join(f"{name}: {kind} = @{name}" for name, kind in kinds.items())
    ours = ", ".join(f'{name} = "{value}"' for name, value in ROUTE.plugin_attributes.items())
    return onnx.parser.parse_function(f"""
    <opset_import: ["" : {OPSET}, "{DOMAIN}" : 1], domain: "{DOMAIN}">
    {SCHEMA.name} <{attributes}> ({", ".join(SCHEMA.inputs)}) => ({", ".join(SCHEMA.outputs)})
    {{
      x = {"Identity" if wide else "Cast <to = 1>"} (hidden)
      flat = {linear} (x, router_weight)
      rows_and_tokens = Shape (position_ids)
      experts = {int64s(num_experts)}
      shape = Concat <axis = 0> (rows_and_tokens, experts)
      router_logits = Reshape (flat, shape)
      ids, weights, coreset = {DOMAIN}.{ROUTE.name} <{passed}, {ours}> (router_logits, {", ".join(ROUTE.inputs[1:])})
      places = {int64s(-1, experts_per_token)}
      expert_ids = Reshape (ids, places)
      expert_weights = Reshape (weights, places)
    }}
    """)
