"""`DmoeSelfAttention`: a layer's attention between its projections, of grouped query heads over cached and new places.

From the fused projection's rows: split into query, key and value; RMSNorm of each head of query and key, if the model
has it; rotary positions (rotate-half) on the first R dimensions of a head; query times D^−1/2; softmax over [past |
new] places; the mixture of their values. Everything up to the roundings of query, key and result is float32.

A token sees the places whose position is ≥ 0 and, with `block_length` > 0, whose block (position // block_length) is
not later than its own; `block_length` 0 is full attention. A token that sees none belongs to padding: its result is
finite and means nothing (kernels: zeros). Eagerly: `eager.py`. The ONNX body has `DmoeAttention` inside.
"""

from ..schema import OpSchema

_INPUTS = (
    "qkv",  # [N, (Hq + 2·Hkv)·D], N = B·T; float32, float16 or bfloat16, as all below but angles and positions
    "cos",  # [B, T, 1, R/2] float32
    "sin",
    "position_ids",  # [B, T] int64, −1 = padding
    "past_positions",  # [B, S] int64, −1 = empty
    "past_key",  # [B, Hkv, S, D], S ≥ 1
    "past_value",
)
_OUTPUTS = (
    "mixed",  # [N, Hq·D]
    "key",  # [B, Hkv, T, D], normed and rotated, as it is to be cached
    "value",
)
_ATTRIBUTES = ("block_length", "eps", "head_norm")  # head_norm: 1 with norms of heads, else 0

SCHEMA = OpSchema("DmoeSelfAttention", 1, _INPUTS, _OUTPUTS, _ATTRIBUTES)  # of a model without norms of heads
NORMED_SCHEMA = OpSchema("DmoeSelfAttention", 1, (*_INPUTS, "q_norm", "k_norm"), _OUTPUTS, _ATTRIBUTES)  # [D] each
