"""ONNX body of `DmoeHead`: all logits, and what is made of them."""

from __future__ import annotations

import onnx
import onnx.parser

from ..schema import DOMAIN, OPSET, int64s
from . import SCHEMA


def head_body(vocab_size: int, linear: str, wide: bool) -> onnx.FunctionProto:
    """The function body; `linear`: the node of a linear layer, `wide`: the hidden state is float32."""
    attributes = ", ".join(("plugin_namespace", "plugin_version", *SCHEMA.attributes))
    # A bias of V values, added: choosing between M·V values would cost ONNX Runtime ten times as much. It is constant.
    return onnx.parser.parse_function(f"""
    <opset_import: ["" : {OPSET}, "{DOMAIN}" : 1], domain: "{DOMAIN}">
    {SCHEMA.name} <{attributes}> ({", ".join(SCHEMA.inputs)}) => ({", ".join(SCHEMA.outputs)})
    {{
      tokens = Shape <end = 1> (hidden)
      rows = Shape <end = 1> (logit_rows)
      tokens_of_row = Div (tokens, rows)
      zero = Constant <value_int = 0> ()
      all_tokens = Squeeze (tokens)
      stride = Squeeze (tokens_of_row)
      first = Range (zero, all_tokens, stride)
      last_axis = {int64s(-1)}
      first_column = Unsqueeze (first, last_axis)
      real_rows = Max (logit_rows, zero)
      places = Add (first_column, real_rows)
      flat_places = Reshape (places, last_axis)
      wanted = Gather <axis = 0> (hidden, flat_places)
      normed = RMSNormalization <axis = -1, epsilon: float = @eps> (wanted, norm)
      product = {linear} (normed, weight)
      flat_logits = {"Identity" if wide else "Cast <to = 1>"} (product)
      wanted_shape = Shape (logit_rows)
      vocabulary = {int64s(vocab_size)}
      shape = Concat <axis = 0> (wanted_shape, vocabulary)
      all_logits = Reshape (flat_logits, shape)
      mask = Constant <value_int: int = @mask_id> ()
      off_on = Constant <value_floats = [0.0, -inf]> ()
      mask_row = Reshape (mask, last_axis)
      bias = OneHot (mask_row, vocabulary, off_on)
      allowed = Add (all_logits, bias)
      best = ReduceMax (allowed, last_axis)
      token_ids = ArgMax <axis = -1, keepdims = 0> (allowed)
      less = Sub (allowed, best)
      powers = Exp (less)
      sum = ReduceSum <keepdims = 0> (powers, last_axis)
      confidence = Reciprocal (sum)
      from = {int64s(0)}
      kept = Shape (logits_kept)
      row_axis = {int64s(1)}
      logits = Slice (all_logits, from, kept, row_axis)
    }}
    """)
