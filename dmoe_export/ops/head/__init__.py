"""`DmoeHead`: the vocabulary head for wanted tokens: the best token, its probability, and few logits or none.

Wanted token (b, m) is token b·T + max(logit_rows[b, m], 0) of the N = B·T tokens (T from the shapes; places that want
nothing, −1, get some result). Its hidden row goes through the model's last RMSNorm (rounded to the hidden state's type)
and the vocabulary product, summed in float32: kernels round no logit, the ONNX body in half precision does. The mask
token is never an answer and takes no part in the probability:
`confidence = 1 / Σ_{v ≠ mask} exp(logit_v − best)`; equal logits go to the lower token.
Logits leave only for the first L ≤ M places of each row, the mask's own among them; of `logits_kept` only the length
counts.
"""

from ..schema import OpSchema

SCHEMA = OpSchema(
    name="DmoeHead",
    version=1,
    inputs=(
        "hidden",  # [N, H] float32, float16 or bfloat16
        "norm",  # [H], type of hidden
        "weight",  # [V, H], type of hidden, or narrower floats
        "logit_rows",  # [B, M] int64, indices into T; −1 = nothing wanted
        "logits_kept",  # [L] int64, 1 ≤ L ≤ M; its values are not read
    ),
    outputs=(
        "token_ids",  # [B, M] int64
        "confidence",  # [B, M] float32
        "logits",  # [B, L, V] float32
    ),
    attributes=("eps", "mask_id"),
)
