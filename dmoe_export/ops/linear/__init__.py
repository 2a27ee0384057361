"""`DmoeLinear`: a linear layer, `y = x · wᵀ + b`, without b where the layer has none.

`w [M, K]` lies as checkpoints store it. Its eager implementation is `torch.nn.functional.linear`, its body `Gemm` with
transB = 1. Graphs have the op in float32 and float16, so that a library of kernels can serve it; TensorRT gets `Gemm`.
"""

from ..schema import OpSchema

SCHEMA = OpSchema(
    name="DmoeLinear",
    version=1,
    inputs=(
        "x",  # [N, K]
        "w",  # [M, K], type of x
        "b",  # [M], type of x; may be left out
    ),
    outputs=("y",),  # [N, M], type of x
    attributes=(),
)
