"""`DmoeLinear` and `DmoeQuantisedLinear`: a linear layer, `y = x · wᵀ + b`, without b where the layer has none.

`w [M, K]` lies as checkpoints store it. Eagerly it is `torch.nn.functional.linear`. Graphs have the op in float32 and
float16, so that a library of kernels can serve it; TensorRT gets `Gemm`. With x in float32, w may be float16 or
bfloat16: its values are exact in float32, and so are products as with a float32 w (body: a cast, then `Gemm`).

`DmoeQuantisedLinear` has w packed and scaled as quantised experts are (`ops/experts/__init__.py`): value =
(u − 2^(bits − 1)) · scale, G values along K for a scale, G a power of two from 32 on that divides K; of 4 bits the even
index is in the low nibble. Its body is `com.microsoft.MatMulNBits`, which must be told K and M: `in_features`,
`out_features`.
"""

from ..schema import OpSchema

SCHEMA = OpSchema(
    name="DmoeLinear",
    version=1,
    inputs=(
        "x",  # [N, K]
        "w",  # [M, K], type of x; or float16 or bfloat16 where x is float32
        "b",  # [M], type of x; may be left out
    ),
    outputs=("y",),  # [N, M], type of x
    attributes=(),
)
QUANTISED_SCHEMA = OpSchema(
    name="DmoeQuantisedLinear",
    version=1,
    inputs=(
        "x",  # [N, K]
        "w",  # [M, K · bits / 8] uint8
        "scales",  # [M, K / G], type of x
        "b",  # [M], type of x; may be left out
    ),
    outputs=("y",),  # [N, M], type of x
    attributes=("bits", "group_size", "in_features", "out_features"),
)
