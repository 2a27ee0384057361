"""`DmoeExperts`: the mixture itself, gated experts with their weights outside the op.

`output[t] = Σ_j weight[t, j] · down[e] · (act(gate[e] · h) ⊙ (up[e] · h))`, e = ids[t, j]; id −1 adds nothing.
Attribute `activation` says what act is, in float32:
- `silu` (SwiGLU), also where a node has no such attribute: silu(x) = x / (1 + e^−x);
- `gelu_tanh` (Gemma): gelu with the tanh approximation, x / 2 · (1 + tanh(√(2/π) · (x + 0.044715 · x³))).

`gate_up [E, 2I, H]` holds gate and up rows interleaved (row 2i = gate i, row 2i + 1 = up i), `down [E, H, I]`; so one
expert is two contiguous slabs. Products in the hidden state's precision, the weighted sum in float32.
With a float32 hidden state, weights may be float16 or bfloat16, whose values float32 holds exactly.
Only experts that occur in `expert_ids` are read.

Quantised experts (`QUANTISED_SCHEMA`: the same op with two more inputs and two attributes) are integers of `bits` bits
with one scale per group of `group_size` values along the last axis, symmetric: value = (u − offset) · scale, where u is
the stored unsigned integer and the offset 2^(bits − 1), 128 or 8. Of 4 bits two values share a byte, the even index in
the low nibble. So `gate_up` is uint8 [E, 2I, H·bits/8] with `gate_up_scales [E, 2I, H/G]`, `down` is uint8
[E, H, I·bits/8] with `down_scales [E, H, I/G]`; scales have the hidden state's type, and G divides H and I.
"""

from __future__ import annotations

from typing import Literal

from ..schema import OpSchema

Activation = Literal["silu", "gelu_tanh"]

_INPUTS = (
    "hidden",  # [N, H], N tokens
    "expert_ids",  # [N, k] int32, −1 = none
    "expert_weights",  # [N, k] float32
    "gate_up",  # [E, 2I, H], type of hidden, narrower floats, or packed
    "down",  # [E, H, I], or packed
)
_OUTPUTS = ("mixed",)  # [N, H], type of hidden

SCHEMA = OpSchema("DmoeExperts", 1, _INPUTS, _OUTPUTS, attributes=(), optional=("activation",))
QUANTISED_SCHEMA = OpSchema("DmoeExperts", 1, (*_INPUTS, "gate_up_scales", "down_scales"), _OUTPUTS,
                            attributes=("bits", "group_size"), optional=("activation",))


def activation_attribute(activation: Activation) -> dict[str, str]:
    """As attributes of a node: none for silu, so that graphs of such models are what they always were."""
    return {} if activation == "silu" else {"activation": activation}
