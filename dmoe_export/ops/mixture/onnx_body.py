"""ONNX body of `DmoeMixture`: `DmoeExperts`, and two linear layers for the shared expert."""

from __future__ import annotations

import onnx
import onnx.parser

from ..experts import SCHEMA as EXPERTS
from ..experts import Activation, activation_attribute
from ..experts.onnx_capacity import ACTIVATED
from ..schema import DOMAIN, OPSET
from . import QUANTISED_SCHEMA, SCHEMA


def mixture_body(quantised: bool, linear: str, activation: Activation = "silu") -> onnx.FunctionProto:
    """The function body, of any sizes; `linear`: the node of a linear layer."""
    schema = QUANTISED_SCHEMA if quantised else SCHEMA
    acting = activation_attribute(activation)
    attributes = ", ".join((*schema.plugin_attributes, *schema.attributes, *acting))
    passed = ", ".join([*(f'{name} = "{value}"' for name, value in (EXPERTS.plugin_attributes | acting).items()),
                        *(f"{name}: int = @{name}" for name in schema.attributes)])
    return onnx.parser.parse_function(f"""
    <opset_import: ["" : {OPSET}, "{DOMAIN}" : 1], domain: "{DOMAIN}">
    {schema.name} <{attributes}> ({", ".join(schema.inputs)}) => ({", ".join(schema.outputs)})
    {{
      routed = {DOMAIN}.{EXPERTS.name} <{passed}> ({", ".join(schema.inputs[:-2])})
      gate_and_up = {linear} (hidden, shared_gate_up)
      gate, up = Split <axis = 1, num_outputs = 2> (gate_and_up)
      {ACTIVATED[activation]}
      shared = {linear} (activated, shared_down)
      mixed = Add (routed, shared)
    }}
    """)
