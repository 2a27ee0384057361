"""ONNX body of `DmoeExperts` in standard ops only, for TensorRT without our plugin: active experts, C at a time.

The experts that occur in `expert_ids` are sorted to the front. A Loop takes the next C (the capacity) of them per turn:
gather their slabs, two batched products over all N tokens, weighted sum in float32 into the accumulator. The number of
turns, ceil(active / C), comes from the data: any count of active experts is right, and no inactive expert is read.

Cost of one forward, against the plugin:
- weights move about three times (slabs read, gathered copy written, copy read); places of the last chunk past the end
  copy the chunk's first expert again, so up to C − 1 slabs more;
- every expert of a chunk is multiplied with all N tokens: N / (tokens of that expert) times the needed work. Small for
  a block of 32 tokens, large for a prefill;
- device memory is one chunk's, whatever is active: C·(slabs + N·(3·I' + H)·itemsize), about;
- the number of turns is data: expect the host to wait for it in every layer and the engine to refuse CUDA graphs
  (TensorRT's notes exclude some control flow; ask the context's `is_stream_capturable`). Not yet run on a GPU.
Why not the simpler forms (TensorRT-RTX 1.7.1, E 256, H 2048, I 512, fp16, 512 tokens): without a loop more than C
active experts would be wrong; `If` with a dense branch copies all experts, 1.9 GiB of device memory against 126 MiB.
"""

from __future__ import annotations

import onnx
import onnx.parser

from ...errors import InputError
from ..schema import DOMAIN, OPSET, int64s
from . import SCHEMA, Activation, activation_attribute

DEFAULT_CAPACITY = 16  # one turn for the usual denoise step (14.6 unique experts for a block of dMoE-16B)

# gate, up → activated, all of one type; gelu in float32, where the cube of a half is one.
ACTIVATED: dict[Activation, str] = {
    "silu": """
        gate_sigmoid = Sigmoid (gate)
        gate_silu = Mul (gate, gate_sigmoid)
        activated = Mul (gate_silu, up)
""",
    "gelu_tanh": """
        gate_f = Cast <to = 1> (gate)
        up_f = Cast <to = 1> (up)
        gate_gelu = Gelu <approximate = "tanh"> (gate_f)
        activated_f = Mul (gate_gelu, up_f)
        activated = CastLike (activated_f, gate)
"""}


def experts_capacity_body(num_experts: int, elem_type: int, capacity: int = DEFAULT_CAPACITY,
                          activation: Activation = "silu") -> onnx.FunctionProto:
    """The function body for E experts, `capacity` of them per turn; other sizes follow from the inputs.

    `elem_type` is the hidden state's onnx.TensorProto type. It has the name and domain of the op's other body and
    replaces it in a model whose opset is `OPSET`. Raises InputError if `capacity` is not in 1 … E.
    """
    if not 1 <= capacity <= num_experts:
        raise InputError(f"expert capacity {capacity} is not between 1 and the model's {num_experts} experts.")
    attributes = ", ".join(("plugin_namespace", "plugin_version", *activation_attribute(activation)))
    text = f"""
    <opset_import: ["" : {OPSET}], domain: "{DOMAIN}">
    {SCHEMA.name} <{attributes}> ({", ".join(SCHEMA.inputs)}) => ({", ".join(SCHEMA.outputs)})
    {{
      zero = Constant <value_float = 0.0> ()
      last = {int64s(-1)}
      axis_0 = {int64s(0)}
      axis_1 = {int64s(1)}
      capacity = Constant <value_int = {capacity}> ()
      offsets = Constant <value = int64{_listed(range(capacity))}> ()
      id_column = Unsqueeze (expert_ids, last)
      weight_column = Unsqueeze (expert_weights, last)
      {active_first(num_experts)}
      capacity_less_1 = Constant <value_int = {capacity - 1}> ()
      rounded = Add (active, capacity_less_1)
      turns = Div (rounded, capacity)
      always = Constant <value = bool {{1}}> ()
      hidden_shape = Shape (hidden)
      nothing = Expand (zero, hidden_shape)
      total = Loop <body = chunk (int64 turn, bool go, float[?, ?] before) => (bool go_on, float[?, ?] after) {{
        go_on = Identity (go)
        begin = Mul (turn, capacity)
        place = Add (begin, offsets)
        used = Less (place, active)
        safe_place = Where (used, place, begin)
        core = Gather <axis = 0> (active_first, safe_place)
        {_products(activation)}
        {_WEIGHTED_SUM}
        after = Add (before, chunk_sum)
      }}> (turns, always, nothing)
      mixed = Cast <to = {elem_type}> (total)
    }}
    """
    return onnx.parser.parse_function(text)


def _listed(values: range, end: str = "") -> str:
    return f"[{len(values)}] {{{', '.join(f'{v}{end}' for v in values)}}}"


def active_first(num_experts: int) -> str:
    """`active`: number of experts in use; `active_first [E]`: all experts, those in use first, then by index."""
    # Keys are unique, so no tie rule of TopK is needed: 2E … E+1 for experts in use, E … 1 for the others.
    return f"""
      all_ids = Constant <value = int32{_listed(range(num_experts))}> ()
      is_id = Equal (id_column, all_ids)
      is_id_f = Cast <to = 1> (is_id)
      axes_01 = {int64s(0, 1)}
      present = ReduceMax <keepdims = 0> (is_id_f, axes_01)
      active_f = ReduceSum <keepdims = 0> (present, axis_0)
      active = Cast <to = 7> (active_f)
      by_index = Constant <value = float{_listed(range(num_experts, 0, -1), ".0")}> ()
      gain = Constant <value_float = {num_experts}.0> ()
      boost = Mul (present, gain)
      key = Add (boost, by_index)
      all_places = {int64s(num_experts)}
      sorted_key, active_first = TopK <axis = 0> (key, all_places)
"""


def _products(activation: Activation) -> str:
    """core [C] → out [C, N, H]: every core expert for every token, in the hidden state's type."""
    return f"""
        gate_up_slabs = Gather <axis = 0> (gate_up, core)
        gate_up_t = Transpose <perm = [0, 2, 1]> (gate_up_slabs)
        gate_and_up = MatMul (hidden, gate_up_t)
        from_0 = {int64s(0)}
        from_1 = {int64s(1)}
        to_end = {int64s(2**63 - 1)}
        axis_2 = {int64s(2)}
        step_2 = {int64s(2)}
        gate = Slice (gate_and_up, from_0, to_end, axis_2, step_2)
        up = Slice (gate_and_up, from_1, to_end, axis_2, step_2)
        {ACTIVATED[activation]}
        down_slabs = Gather <axis = 0> (down, core)
        down_t = Transpose <perm = [0, 2, 1]> (down_slabs)
        out = MatMul (activated, down_t)
"""


# out [C, N, H] → chunk_sum [N, H]. A token's product with an expert it did not choose may overflow, and 0 · inf is
# NaN: such products are replaced, not multiplied by 0. Id −2 is no token's, so unused places weigh nothing.
_WEIGHTED_SUM = """
        core_int = Cast <to = 6> (core)
        no_id = Constant <value = int32 {-2}> ()
        core_id = Where (used, core_int, no_id)
        is_core = Equal (id_column, core_id)
        pair_weight = Where (is_core, weight_column, zero)
        core_weight = ReduceSum <keepdims = 0> (pair_weight, axis_1)
        core_weight_t = Transpose <perm = [1, 0]> (core_weight)
        factor = Unsqueeze (core_weight_t, last)
        out_f = Cast <to = 1> (out)
        product = Mul (out_f, factor)
        no_weight = Equal (factor, zero)
        weighted = Where (no_weight, zero, product)
        chunk_sum = ReduceSum <keepdims = 0> (weighted, axis_0)
"""
