"""ONNX body of `DmoeExperts`: `com.microsoft.MoE` on one row per (token, place) pair.

ONNX Runtime's op routes by softmax over `router_probs`. With one row per pair and k = 1 the chosen expert's
probability is exactly 1, so the weights stay outside, in float32, and need not sum to 1.
A pair without an expert (id −1) borrows the largest id of the forward: no expert is read that is not already active.
"""

from __future__ import annotations

import onnx
import onnx.parser

from ..schema import DOMAIN, OPSET, int64s
from . import SCHEMA


def experts_body(num_experts: int, experts_per_token: int, hidden_size: int, elem_type: int) -> onnx.FunctionProto:
    """The function body for these sizes; `elem_type` is the hidden state's onnx.TensorProto type."""
    text = f"""
    <opset_import: ["" : {OPSET}, "com.microsoft" : 1], domain: "{DOMAIN}">
    {SCHEMA.name} <plugin_namespace, plugin_version> ({", ".join(SCHEMA.inputs)}) => ({", ".join(SCHEMA.outputs)})
    {{
      flat = {int64s(-1)}
      pair_ids = Reshape (expert_ids, flat)
      zero_id = Constant <value = int32 {{0}}> ()
      some_id = ReduceMax <keepdims = 0> (pair_ids)
      active_id = Max (some_id, zero_id)
      has_expert = GreaterOrEqual (pair_ids, zero_id)
      safe_ids = Where (has_expert, pair_ids, active_id)
      safe_ids_long = Cast <to = 7> (safe_ids)
      depth = {int64s(num_experts)}
      off_on = Constant <value_floats = [-inf, 0.0]> ()
      one_expert = OneHot (safe_ids_long, depth, off_on)
      probs = Cast <to = {elem_type}> (one_expert)
      pair_axis = {int64s(1)}
      hidden_column = Unsqueeze (hidden, pair_axis)
      repeats = {int64s(1, experts_per_token, 1)}
      hidden_pairs = Tile (hidden_column, repeats)
      row_shape = {int64s(-1, hidden_size)}
      rows = Reshape (hidden_pairs, row_shape)
      row_out = com.microsoft.MoE <k = 1, activation_type = "swiglu", swiglu_fusion = 1, activation_alpha = 1.0,
        activation_beta = 0.0, normalize_routing_weights = 1> (rows, probs, gate_up, , down)
      row_out_f = Cast <to = 1> (row_out)
      pair_shape = Shape (hidden_pairs)
      pair_out = Reshape (row_out_f, pair_shape)
      zero = Constant <value_float = 0.0> ()
      real_id = GreaterOrEqual (expert_ids, zero_id)
      real_weights = Where (real_id, expert_weights, zero)
      last = {int64s(-1)}
      weight_column = Unsqueeze (real_weights, last)
      weighted = Mul (pair_out, weight_column)
      summed = ReduceSum <keepdims = 0> (weighted, pair_axis)
      mixed = Cast <to = {elem_type}> (summed)
    }}
    """
    return onnx.parser.parse_function(text)
