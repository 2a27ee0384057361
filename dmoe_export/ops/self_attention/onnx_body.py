"""ONNX body of `DmoeSelfAttention`, around `DmoeAttention`."""

from __future__ import annotations

import onnx
import onnx.parser

from ..schema import DOMAIN, OPSET, int64s
from . import NORMED_SCHEMA, SCHEMA


def self_attention_body(heads: int, kv_heads: int, head_dim: int, rotary_dim: int, *, normed: bool, full: bool,
                        wide: bool) -> onnx.FunctionProto:
    """The function body for these sizes; `normed`: heads have norms, `full`: attention is, `wide`: q is float32."""
    schema = NORMED_SCHEMA if normed else SCHEMA
    attributes = ", ".join(("plugin_namespace", "plugin_version", *schema.attributes))
    share = heads // kv_heads
    return onnx.parser.parse_function(f"""
    <opset_import: ["" : {OPSET}, "{DOMAIN}" : 1], domain: "{DOMAIN}">
    {schema.name} <{attributes}> ({", ".join(schema.inputs)}) => ({", ".join(schema.outputs)})
    {{
      widths = {int64s(heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)}
      q_flat, k_flat, v_flat = Split <axis = 1> (qkv, widths)
      rows_and_tokens = Shape (position_ids)
      rows = Shape <end = 1> (position_ids)
      {_heads("q", heads, head_dim, rotary_dim, normed, wide)}
      scale = Constant <value_float = {head_dim ** -0.5!r}> ()
      q_scaled = Mul (q_rotated, scale)
      q = {"Identity (q_scaled)" if wide else "CastLike (q_scaled, qkv)"}
      {_heads("k", kv_heads, head_dim, rotary_dim, normed, wide)}
      k = {"Identity (k_rotated)" if wide else "CastLike (k_rotated, qkv)"}
      key = Transpose <perm = [0, 2, 1, 3]> (k)
      v_dims = {int64s(kv_heads, head_dim)}
      v_shape = Concat <axis = 0> (rows_and_tokens, v_dims)
      v = Reshape (v_flat, v_shape)
      value = Transpose <perm = [0, 2, 1, 3]> (v)
      apart_dims = {int64s(kv_heads, share, head_dim)}
      apart_shape = Concat <axis = 0> (rows_and_tokens, apart_dims)
      apart = Reshape (q, apart_shape)
      by_head = Transpose <perm = [0, 2, 3, 1, 4]> (apart)
      stack_dims = {int64s(kv_heads, -1, head_dim)}
      stack_shape = Concat <axis = 0> (rows, stack_dims)
      stacked = Reshape (by_head, stack_shape)
      keys_at = Concat <axis = 1> (past_positions, position_ids)
      nothing = {int64s(0)}
      {_seen(full)}
      see = Constant <value_float = 0.0> ()
      hide = Constant <value_float = -1e30> ()
      flat_bias = Where (seen, see, hide)
      two_axes = {int64s(1, 2)}
      bias = Unsqueeze (flat_bias, two_axes)
      mixed_stack = {DOMAIN}.DmoeAttention (stacked, key, value, past_key, past_value, bias)
      heads_dims = {int64s(kv_heads, share, -1, head_dim)}
      heads_shape = Concat <axis = 0> (rows, heads_dims)
      mixed_heads = Reshape (mixed_stack, heads_shape)
      by_token = Transpose <perm = [0, 3, 1, 2, 4]> (mixed_heads)
      flat_dims = {int64s(-1, heads * head_dim)}
      mixed = Reshape (by_token, flat_dims)
    }}
    """)


def _heads(x: str, heads: int, head_dim: int, rotary_dim: int, normed: bool, wide: bool) -> str:
    """Heads of query or key, [B, T, heads, D] float32, normed and rotated."""
    half, rest = rotary_dim // 2, head_dim - rotary_dim
    parts = f"{x}_left, {x}_right" + (f", {x}_rest" if rest else "")
    sizes = int64s(half, half, rest) if rest else int64s(half, half)
    cast = "Identity" if wide else "Cast <to = 1>"
    norm = (f"""{x}_weight = {cast} ({x}_norm)
      {x}_normed = RMSNormalization <axis = -1, epsilon: float = @eps> ({x}_wide, {x}_weight)"""
            if normed else f"{x}_normed = Identity ({x}_wide)")
    return f"""
      {x}_dims = {int64s(heads, head_dim)}
      {x}_shape = Concat <axis = 0> (rows_and_tokens, {x}_dims)
      {x}_heads = Reshape ({x}_flat, {x}_shape)
      {x}_wide = {cast} ({x}_heads)
      {norm}
      {x}_sizes = {sizes}
      {parts} = Split <axis = -1> ({x}_normed, {x}_sizes)
      {x}_left_cos = Mul ({x}_left, cos)
      {x}_right_sin = Mul ({x}_right, sin)
      {x}_new_left = Sub ({x}_left_cos, {x}_right_sin)
      {x}_right_cos = Mul ({x}_right, cos)
      {x}_left_sin = Mul ({x}_left, sin)
      {x}_new_right = Add ({x}_right_cos, {x}_left_sin)
      {x}_rotated = Concat <axis = -1> ({x}_new_left, {x}_new_right{f", {x}_rest" if rest else ""})
"""


def _seen(full: bool) -> str:
    """Which places a token sees: bool [B, 1 or T, S + T]."""
    there = """there = GreaterOrEqual (keys_at, nothing)
      one_axis = Constant <value_ints = [1]> ()""".replace("Constant <value_ints = [1]> ()", int64s(1))
    if full:
        return there + "\n      seen = Unsqueeze (there, one_axis)"
    return there + f"""
      any_query = Unsqueeze (there, one_axis)
      last_axis = {int64s(-1)}
      length = Constant <value_int: int = @block_length> ()
      at = Max (position_ids, nothing)
      query_block = Div (at, length)
      query_column = Unsqueeze (query_block, last_axis)
      keys_real = Max (keys_at, nothing)
      key_block = Div (keys_real, length)
      key_row = Unsqueeze (key_block, one_axis)
      earlier = LessOrEqual (key_row, query_column)
      seen = And (earlier, any_query)
"""
