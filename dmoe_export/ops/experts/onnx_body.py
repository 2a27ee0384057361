"""ONNX body of `DmoeExperts`: `com.microsoft.MoE` on one row per (token, place) pair.

ONNX Runtime's op routes by softmax over `router_probs`. With one row per pair and k = 1 the chosen expert's
probability is exactly 1, so the weights stay outside, in float32, and need not sum to 1.
A pair without an expert (id −1) borrows the largest id of the forward: no expert is read that is not already active.

Quantised experts go to `com.microsoft.QMoE` in the same way, with one trick. Weights that ONNX Runtime knows to be
constant are packed again when the model is loaded, all experts of them, and 8-bit products then round the hidden state
to 8 bits as well (relative error 1e-2). So the body reshapes the weights to the shape they have, plus a zero that only
a run knows: nothing is copied, nothing is known before, and the op dequantises the active experts to float32.
"""

from __future__ import annotations

import onnx
import onnx.parser

from ...weight_formats import ExpertQuantisation
from ..schema import DOMAIN, OPSET, int64s
from . import QUANTISED_SCHEMA, SCHEMA, Activation
from .onnx_loop import experts_loop_body

_SWIGLU = ('k = 1, activation_type = "swiglu", swiglu_fusion = 1, activation_alpha = 1.0, activation_beta = 0.0, '
           "normalize_routing_weights = 1")


def experts_body(num_experts: int, experts_per_token: int, hidden_size: int, elem_type: int,
                 quantisation: ExpertQuantisation | None = None, width: int = 0, narrow: bool = False,
                 activation: Activation = "silu") -> onnx.FunctionProto:
    """The function body for these sizes; `elem_type` is the hidden state's onnx.TensorProto type.

    `width`: I as stored, asked for with `quantisation` only. `narrow`: weights are floats of another type than the
    hidden state. ONNX Runtime casts constant ones when it loads the graph, all experts, and keeps the result: without
    our kernels they take the memory of the hidden state's type. `activation`: of the nodes; ONNX Runtime's ops have
    none but silu, so for another one the body is that of `onnx_loop.py`.
    """
    if activation != "silu":
        return experts_loop_body(num_experts, elem_type, activation, quantisation)
    schema = QUANTISED_SCHEMA if quantisation else SCHEMA
    attributes = ", ".join(("plugin_namespace", "plugin_version", *schema.attributes))
    product = (_quantised_product(quantisation, num_experts, hidden_size, width) if quantisation
               else _product(narrow))
    text = f"""
    <opset_import: ["" : {OPSET}, "com.microsoft" : 1], domain: "{DOMAIN}">
    {schema.name} <{attributes}> ({", ".join(schema.inputs)}) => ({", ".join(schema.outputs)})
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
      {product}
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


def _product(narrow: bool) -> str:
    """`row_out` from weights of the hidden state's type, or cast to it."""
    if not narrow:
        return f"row_out = com.microsoft.MoE <{_SWIGLU}> (rows, probs, gate_up, , down)"
    return f"""
      gate_up_cast = CastLike (gate_up, hidden)
      down_cast = CastLike (down, hidden)
      row_out = com.microsoft.MoE <{_SWIGLU}> (rows, probs, gate_up_cast, , down_cast)
"""


def _quantised_product(how: ExpertQuantisation, experts: int, hidden: int, width: int) -> str:
    """`row_out` from weights whose shape is known when it runs."""
    gate_up, down = (int64s(experts, 2 * width, hidden * how.bits // 8), int64s(experts, hidden, width * how.bits // 8))
    return f"""
      never_above = Min (active_id, zero_id)
      run_time_zero = Cast <to = 7> (never_above)
      gate_up_shape = {gate_up}
      gate_up_shape_now = Add (gate_up_shape, run_time_zero)
      gate_up_now = Reshape (gate_up, gate_up_shape_now)
      down_shape = {down}
      down_shape_now = Add (down_shape, run_time_zero)
      down_now = Reshape (down, down_shape_now)
      row_out = com.microsoft.QMoE <{_SWIGLU}, expert_weight_bits = {how.bits}, block_size = {how.group_size}> (rows,
        probs, gate_up_now, gate_up_scales, , down_now, down_scales)
"""
