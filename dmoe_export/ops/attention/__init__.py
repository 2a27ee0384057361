"""`DmoeAttention`: softmax(q · keysᵀ + bias) · values over cached and new places of grouped-query attention.

The query heads of one key head are stacked along the token axis: query s · T + t is that of head s and token t. The
bias is a mask: 0 where a token sees a place, −1e30 where it does not. A token that sees none belongs to padding: its
result is finite and means nothing (kernels: zeros; the body: the mean of all values). Eagerly: `eager.py`.
"""

from ..schema import OpSchema

SCHEMA = OpSchema(
    name="DmoeAttention",
    version=1,
    inputs=(
        "q",  # [B, Hkv, share · T, D], scaled; float32 or float16
        "key",  # [B, Hkv, T, D], type of q, as all below but the bias
        "value",
        "past_key",  # [B, Hkv, S, D]
        "past_value",
        "bias",  # [B, 1, 1, T or 1, S + T] float32
    ),
    outputs=("mixed",),  # [B, Hkv, share · T, D], type of q
    attributes=(),
)
