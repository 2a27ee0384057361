"""`DmoeRouter`: router logits and block routing in one op.

`router_logits = hidden · router_weightᵀ` in float32 (products of the hidden state's values with float32 weights, summed
in float32: logits decide, and halves tie), then `DmoeBlockRoute` (`ops/block_route/__init__.py`) on them, with its
attributes.
The ONNX body is these two ops.
"""

from ..block_route import SCHEMA as ROUTE
from ..schema import OpSchema

SCHEMA = OpSchema(
    name="DmoeRouter",
    version=1,
    inputs=(
        "hidden",  # [N, H], N = B·T; float32, float16 or bfloat16
        "router_weight",  # [E, H] float32
        *ROUTE.inputs[1:],  # expert_bias [E], position_ids [B, T], top_p [1], min_experts [1], coreset_size [1]
    ),
    outputs=(
        "expert_ids",  # [N, k] int32, −1 = none
        "expert_weights",  # [N, k] float32
        "router_logits",  # [B, T, E] float32; a graph may leave it out
    ),
    attributes=ROUTE.attributes,
)
