"""`DmoeExperts`: the mixture itself, SwiGLU experts with their weights outside the op.

`output[t] = Σ_j weight[t, j] · down[e] · (silu(gate[e] · h) ⊙ (up[e] · h))`, e = ids[t, j]; id −1 adds nothing.
`gate_up [E, 2I, H]` holds gate and up rows interleaved (row 2i = gate i, row 2i + 1 = up i), `down [E, H, I]`; so one
expert is two contiguous slabs. Products in the hidden state's precision, the weighted sum in float32.
Only experts that occur in `expert_ids` are read.
"""

from ..schema import OpSchema

SCHEMA = OpSchema(
    name="DmoeExperts",
    version=1,
    inputs=(
        "hidden",  # [N, H], N tokens
        "expert_ids",  # [N, k] int32, −1 = none
        "expert_weights",  # [N, k] float32
        "gate_up",  # [E, 2I, H]
        "down",  # [E, H, I]
    ),
    outputs=("mixed",),  # [N, H], type of hidden
    attributes=(),
)
