"""`DmoeAddNorm`: what a layer's half adds to the residual stream, and the norm that the next half reads.

`total = x + delta`, rounded; `normed = total / sqrt(mean(total²) + eps) · weight` of the rounded total, float32 inside.
"""

from ..schema import OpSchema

SCHEMA = OpSchema(
    name="DmoeAddNorm",
    version=1,
    inputs=(
        "x",  # [N, H] float32, float16 or bfloat16, as all below
        "delta",  # [N, H]
        "weight",  # [H]
    ),
    outputs=("total", "normed"),  # [N, H] each
    attributes=("eps",),
)
