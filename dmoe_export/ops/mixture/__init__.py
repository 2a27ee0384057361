"""`DmoeMixture`: routed experts and the shared expert, which every token takes with weight 1.

`output = DmoeExperts(…) + down_s · (act(gate_s · h) ⊙ (up_s · h))`; the shared expert is the last summand, summed in
float32 by kernels and rounded once; attribute `activation` is that of all experts. `shared_gate_up` has all gate rows
above all up rows (`gate_up` of the routed experts has them interleaved). Quantised routed experts as in
`ops/experts/__init__.py`; the shared expert's weights are floats. The ONNX body is `DmoeExperts` and two `DmoeLinear`.
"""

from ..experts import QUANTISED_SCHEMA as QUANTISED_EXPERTS
from ..experts import SCHEMA as EXPERTS
from ..schema import OpSchema

_SHARED = (
    "shared_gate_up",  # [2·Is, H], type of hidden, or narrower floats
    "shared_down",  # [H, Is]
)

SCHEMA = OpSchema("DmoeMixture", 1, (*EXPERTS.inputs, *_SHARED), EXPERTS.outputs, EXPERTS.attributes,
                  EXPERTS.optional)
QUANTISED_SCHEMA = OpSchema("DmoeMixture", 1, (*QUANTISED_EXPERTS.inputs, *_SHARED), EXPERTS.outputs,
                            QUANTISED_EXPERTS.attributes, QUANTISED_EXPERTS.optional)
