"""ONNX body of `DmoeExperts` in standard ops, for activations that `com.microsoft.MoE` lacks: a Loop over experts.

ONNX Runtime's op knows a gate for silu alone, and its gelu has none. So a turn of the Loop takes the next expert that
occurs in `expert_ids`, gathers its tokens and its slab, multiplies the one with the other in float32 and adds the
weighted rows to those of the tokens. The number of turns comes from the data; no other expert is read.

Cost of one forward, against our kernels: every active slab is copied once, and once more where it is no float32
(integers: about four passes in float32); products are those that are needed, no more; memory is one expert's in
float32. A token's experts are summed in the order of ids, not of places. On CUDA the host waits in every turn.
Measured on 2 shared cores, int8, H 2816, I 704, 128 experts, k 8, 256 tokens: 26 s, our kernel 4.7 s (the body with
silu 8 s).
"""

from __future__ import annotations

import onnx
import onnx.parser

from ...weight_formats import ExpertQuantisation
from ..schema import DOMAIN, OPSET, int64s
from . import QUANTISED_SCHEMA, SCHEMA, Activation, activation_attribute
from .onnx_capacity import ACTIVATED, active_first


def experts_loop_body(num_experts: int, elem_type: int, activation: Activation,
                      quantisation: ExpertQuantisation | None = None) -> onnx.FunctionProto:
    """The function body for E experts; other sizes, and the type of plain weights, follow from the inputs.

    `elem_type`: the hidden state's onnx.TensorProto type.
    """
    schema = QUANTISED_SCHEMA if quantisation else SCHEMA
    attributes = ", ".join((*schema.plugin_attributes, *schema.attributes, *activation_attribute(activation)))
    text = f"""
    <opset_import: ["" : {OPSET}], domain: "{DOMAIN}">
    {schema.name} <{attributes}> ({", ".join(schema.inputs)}) => ({", ".join(schema.outputs)})
    {{
      zero = Constant <value_float = 0.0> ()
      last = {int64s(-1)}
      axis_0 = {int64s(0)}
      axis_1 = {int64s(1)}
      id_column = Unsqueeze (expert_ids, last)
      {active_first(num_experts)}
      always = Constant <value = bool {{1}}> ()
      wide = Cast <to = 1> (hidden)
      hidden_shape = Shape (hidden)
      nothing = Expand (zero, hidden_shape)
      total = Loop <body = one (int64 turn, bool go, float[?, ?] before) => (bool go_on, float[?, ?] after) {{
        go_on = Identity (go)
        expert = Gather <axis = 0> (active_first, turn)
        expert_int = Cast <to = 6> (expert)
        is_expert = Equal (expert_ids, expert_int)
        place_weights = Where (is_expert, expert_weights, zero)
        token_weights = ReduceSum <keepdims = 0> (place_weights, axis_1)
        is_expert_f = Cast <to = 1> (is_expert)
        is_token = ReduceMax <keepdims = 0> (is_expert_f, axis_1)
        token_row = NonZero (is_token)
        token_column = Transpose (token_row)
        tokens = Squeeze (token_row, axis_0)
        x = Gather <axis = 0> (wide, tokens)
        {_slab("gate_up", quantisation)}
        gate_and_up = Gemm <transB = 1> (x, gate_up_slab)
        from_0 = {int64s(0)}
        from_1 = {int64s(1)}
        to_end = {int64s(2**63 - 1)}
        step_2 = {int64s(2)}
        gate = Slice (gate_and_up, from_0, to_end, axis_1, step_2)
        up = Slice (gate_and_up, from_1, to_end, axis_1, step_2)
        {ACTIVATED[activation]}
        {_slab("down", quantisation)}
        out = Gemm <transB = 1> (activated, down_slab)
        factors = Gather <axis = 0> (token_weights, tokens)
        factor_column = Unsqueeze (factors, last)
        weighted = Mul (out, factor_column)
        after = ScatterND <reduction = "add"> (before, token_column, weighted)
      }}> (active, always, nothing)
      mixed = Cast <to = {elem_type}> (total)
    }}
    """
    return onnx.parser.parse_function(text)


def _slab(name: str, how: ExpertQuantisation | None) -> str:
    """`{name}_slab [rows, C]`: the expert's matrix in float32."""
    if how is None:
        return f"""
        {name}_stored = Gather <axis = 0> ({name}, expert)
        {name}_slab = Cast <to = 1> ({name}_stored)
"""
    unpacked = f"{name}_integers = Identity ({name}_bytes)" if how.bits == 8 else f"""
        {name}_pairs = Unsqueeze ({name}_bytes, last)
        {name}_mask = Constant <value = uint8 {{15}}> ()
        {name}_four = Constant <value = uint8 {{4}}> ()
        {name}_low = BitwiseAnd ({name}_pairs, {name}_mask)
        {name}_high = BitShift <direction = "RIGHT"> ({name}_pairs, {name}_four)
        {name}_integers = Concat <axis = -1> ({name}_low, {name}_high)
"""
    return f"""
        {name}_bytes = Gather <axis = 0> ({name}, expert)
        {unpacked}
        {name}_stored_scales = Gather <axis = 0> ({name}_scales, expert)
        {name}_scales_f = Cast <to = 1> ({name}_stored_scales)
        {name}_scale_column = Unsqueeze ({name}_scales_f, last)
        {name}_groups = {int64s(0, -1, how.group_size)}
        {name}_unsigned = Cast <to = 1> ({name}_integers)
        {name}_flat = Flatten <axis = 1> ({name}_unsigned)
        {name}_grouped = Reshape ({name}_flat, {name}_groups)
        {name}_offset = Constant <value_float = {1 << how.bits - 1}.0> ()
        {name}_signed = Sub ({name}_grouped, {name}_offset)
        {name}_scaled = Mul ({name}_signed, {name}_scale_column)
        {name}_slab = Flatten <axis = 1> ({name}_scaled)
"""
