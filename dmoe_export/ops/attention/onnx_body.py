"""ONNX body of `DmoeAttention`: two products for scores and two for the mixture, cached and new places apart."""

from __future__ import annotations

import onnx
import onnx.parser

from ..schema import DOMAIN, OPSET, int64s
from . import SCHEMA


def attention_body(half: bool) -> onnx.FunctionProto:
    """The function body, of any sizes; `half`: q is in half precision, the softmax is in float32 all the same."""
    wide, narrow = ("Cast <to = 1>", "CastLike") if half else ("Identity", "Identity")
    as_q = "weights, q" if half else "weights"
    return onnx.parser.parse_function(f"""
    <opset_import: ["" : {OPSET}], domain: "{DOMAIN}">
    {SCHEMA.name} ({", ".join(SCHEMA.inputs)}) => ({", ".join(SCHEMA.outputs)})
    {{
      past_columns = Transpose <perm = [0, 1, 3, 2]> (past_key)
      past_scores = MatMul (q, past_columns)
      columns = Transpose <perm = [0, 1, 3, 2]> (key)
      new_scores = MatMul (q, columns)
      scores = Concat <axis = -1> (past_scores, new_scores)
      rows_and_heads = Shape <start = 0, end = 2> (q)
      share = {int64s(-1)}
      tokens = Shape <start = 2, end = 3> (key)
      places = Shape <start = 3, end = 4> (scores)
      by_token = Concat <axis = 0> (rows_and_heads, share, tokens, places)
      apart = Reshape (scores, by_token)
      wide = {wide} (apart)
      masked = Add (wide, bias)
      weights = Softmax <axis = -1> (masked)
      narrow = {narrow} ({as_q})
      stacked = Shape (scores)
      probs = Reshape (narrow, stacked)
      first = {int64s(0)}
      past = Shape <start = 2, end = 3> (past_key)
      last = {int64s(2**63 - 1)}
      axis = {int64s(3)}
      past_probs = Slice (probs, first, past, axis)
      past_mixed = MatMul (past_probs, past_value)
      new_probs = Slice (probs, past, last, axis)
      new_mixed = MatMul (new_probs, value)
      mixed = Add (past_mixed, new_mixed)
    }}
    """)
