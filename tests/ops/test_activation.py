"""Activations of experts: eager against the words of ops/experts/__init__.py, ONNX bodies against eager."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from cpu_ops_helpers import ACTIVATIONS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from quantised_helpers import values

from dmoe_export.ops import experts as experts_op
from dmoe_export.ops import mixture as mixture_op
from dmoe_export.ops.experts import Activation, activation_attribute
from dmoe_export.ops.experts.eager import activate, experts
from dmoe_export.ops.experts.onnx_body import experts_body
from dmoe_export.ops.experts.onnx_capacity import experts_capacity_body
from dmoe_export.ops.experts.onnx_loop import experts_loop_body
from dmoe_export.ops.experts.quantised import quantise
from dmoe_export.ops.mixture.eager import mixture
from dmoe_export.ops.mixture.onnx_body import mixture_body
from dmoe_export.ops.schema import DOMAIN, OPSET
from dmoe_export.weight_formats import ExpertQuantisation

E, K, H, I, SHARED = 7, 3, 64, 32, 40  # noqa: E741
EVERY = pytest.mark.parametrize("activation", ACTIVATIONS)


def definition(x: float, activation: Activation) -> float:
    """The formulas of ops/experts/__init__.py."""
    if activation == "silu":
        return x / (1 + math.exp(-x))
    return x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@EVERY
def test_eager_is_the_definition(activation):
    x = np.linspace(-20, 20, 2001)
    want = np.array([definition(value, activation) for value in x])
    np.testing.assert_allclose(activate(torch.from_numpy(x), activation), want, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(activate(torch.from_numpy(x).float(), activation), want, rtol=1e-6, atol=1e-6)


def test_they_differ():
    x = torch.linspace(-4, 4, 9, dtype=torch.float64)
    assert (activate(x, "silu") - activate(x, "gelu_tanh")).abs().max() > 0.19
    with pytest.raises(KeyError):
        activate(x, "relu")  # type: ignore[arg-type]


def case(bits=0, tokens=9, seed=0, empty=0.3, dtype=np.float32, stored=None):
    """Inputs of the op by name; places without an expert have weight NaN, which is never used."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, E, (tokens, K)).astype(np.int32)  # repeats occur
    ids[rng.random(ids.shape) < empty] = -1
    weights = np.where(ids < 0, np.nan, rng.random((tokens, K)) * 3).astype(np.float32)
    feeds = {"hidden": rng.normal(size=(tokens, H)).astype(dtype), "expert_ids": ids, "expert_weights": weights}
    matrices = {"gate_up": rng.normal(size=(E, 2 * I, H)) * H**-0.5, "down": rng.normal(size=(E, H, I)) * I**-0.5}
    if not bits:
        return feeds | {name: matrix.astype(stored or dtype) for name, matrix in matrices.items()}
    made = {name: quantise(torch.from_numpy(matrix), ExpertQuantisation(bits=bits, group_size=32),
                           torch.from_numpy(np.zeros(1, dtype)).dtype) for name, matrix in matrices.items()}
    return (feeds | {name: packed.numpy() for name, (packed, _) in made.items()}
            | {f"{name}_scales": scales.numpy() for name, (_, scales) in made.items()})


def wanted(feeds, bits, activation):
    """By the definition, one pair at a time, in float64."""
    gate_up, down = (values(feeds[name], feeds[f"{name}_scales"], bits) if bits else feeds[name].astype(np.float64)
                     for name in ("gate_up", "down"))
    out = np.zeros(feeds["hidden"].shape)
    for token, places in enumerate(feeds["expert_ids"]):
        for place, e in enumerate(places):
            if e >= 0:
                gate, up = (gate_up[e] @ feeds["hidden"][token].astype(float)).reshape(-1, 2).T
                acted = np.array([definition(value, activation) for value in gate]) * up
                out[token] += feeds["expert_weights"][token, place] * (down[e] @ acted)
    return out


@EVERY
@pytest.mark.parametrize("bits", [0, 8, 4])
def test_eager_experts_are_the_definition(bits, activation):
    feeds = case(bits)
    got = experts(*(torch.from_numpy(np.nan_to_num(value)) for value in feeds.values()), activation=activation)
    np.testing.assert_allclose(got, wanted(feeds, bits, activation), atol=1e-5)


def model(body, schema, feeds, activation, **attributes) -> onnx.ModelProto:
    """One node with this body and those that it needs; sizes of tokens and experts are open."""
    node = helper.make_node(schema.name, schema.inputs, schema.outputs, domain=DOMAIN, **schema.plugin_attributes,
                            **activation_attribute(activation), **attributes)
    first = {"hidden": "N", "expert_ids": "N", "expert_weights": "N"}
    inputs = [helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype),
                                            [first.get(name, value.shape[0]), *value.shape[1:]])
              for name, value in feeds.items()]
    graph = helper.make_graph([node], "one", inputs,
                              [helper.make_tensor_value_info("mixed", inputs[0].type.tensor_type.elem_type, ["N", H])])
    made = helper.make_model(graph, functions=list(body), ir_version=10, opset_imports=[
        helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)])
    onnx.checker.check_model(made, full_check=True)
    return made


def run(made, feeds):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    inputs = {name: ort.OrtValue.ortvalue_from_numpy_with_onnx_type(value.view(np.uint16), TensorProto.BFLOAT16)
              if value.dtype == ml_dtypes.bfloat16 else ort.OrtValue.ortvalue_from_numpy(value)
              for name, value in feeds.items()}
    return session.run_with_ort_values(None, inputs)[0].numpy()


def loop_model(bits, feeds, activation):
    """The op with the body that is a loop over experts."""
    how = ExpertQuantisation(bits=bits, group_size=32) if bits else None
    elem = helper.np_dtype_to_tensor_dtype(feeds["hidden"].dtype)
    schema = experts_op.QUANTISED_SCHEMA if bits else experts_op.SCHEMA
    return model([experts_loop_body(E, elem, activation, how)], schema, feeds, activation,
                 **(how.model_dump() if how else {}))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(ACTIVATIONS), st.sampled_from([0, 8, 4]), st.integers(1, 20), st.integers(0, 2**32 - 1),
       st.sampled_from([0.0, 0.3, 0.9, 1.0]))
def test_loop_is_the_definition(activation, bits, tokens, seed, empty):
    feeds = case(bits, tokens, seed, empty)
    got = run(loop_model(bits, feeds, activation), feeds)
    np.testing.assert_allclose(got, wanted(feeds, bits, activation), atol=1e-5)


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16])
def test_loop_with_narrow_weights(stored):
    feeds = case(stored=stored)
    wide = feeds | {name: feeds[name].astype(np.float32) for name in ("gate_up", "down")}
    np.testing.assert_array_equal(run(loop_model(0, feeds, "gelu_tanh"), feeds),
                                  run(loop_model(0, wide, "gelu_tanh"), wide))


@pytest.mark.parametrize("bits", [0, 8, 4])
def test_loop_in_half_precision(bits):
    feeds = case(bits, dtype=np.float16)
    got, want = run(loop_model(bits, feeds, "gelu_tanh"), feeds), wanted(feeds, bits, "gelu_tanh")
    assert got.dtype == np.float16 and np.abs(want).max() > 1
    np.testing.assert_allclose(got, want, rtol=2**-11, atol=1e-6)


def test_loop_reads_no_other_expert():
    """NaN in experts and in tokens that nobody chose stays out."""
    feeds = case()
    ids = feeds["expert_ids"]
    ids[ids == 3], ids[4] = 2, -1
    want = run(loop_model(0, feeds, "gelu_tanh"), feeds)
    feeds["gate_up"][3], feeds["down"][3], feeds["hidden"][4] = np.nan, np.nan, np.nan
    np.testing.assert_array_equal(run(loop_model(0, feeds, "gelu_tanh"), feeds), want)
    assert not want[4].any()


def test_exported_body_by_activation():
    """What ONNX Runtime has an op for keeps it."""
    used = {activation: {node.op_type for node in experts_body(E, K, H, TensorProto.FLOAT, activation=activation).node}
            for activation in ACTIVATIONS}
    assert "MoE" in used["silu"] and "Loop" in used["gelu_tanh"] and "MoE" not in used["gelu_tanh"]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("capacity", [1, 3, E])
def test_capacity_body(capacity, dtype):
    feeds = case(tokens=12, dtype=dtype)
    elem = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    body = experts_capacity_body(E, elem, capacity, "gelu_tanh")
    got = run(model([body], experts_op.SCHEMA, feeds, "gelu_tanh"), feeds)
    want = wanted(feeds, 0, "gelu_tanh")
    np.testing.assert_allclose(got, want, atol=1e-5 if dtype == np.float32 else 0.01)


@EVERY
@pytest.mark.parametrize("bits", [0, 4])
def test_mixture_body(bits, activation):
    """The shared expert has the activation, too."""
    rng = np.random.default_rng(1)
    feeds = case(bits) | {"shared_gate_up": (rng.normal(size=(2 * SHARED, H)) / 8).astype(np.float32),
                          "shared_down": (rng.normal(size=(H, SHARED)) / 6).astype(np.float32)}
    feeds["expert_weights"] = np.nan_to_num(feeds["expert_weights"])
    how = ExpertQuantisation(bits=bits, group_size=32) if bits else None
    bodies = [mixture_body(bool(bits), "Gemm <transB = 1>", activation),
              experts_body(E, K, H, TensorProto.FLOAT, how, I, activation=activation)]
    schema = mixture_op.QUANTISED_SCHEMA if bits else mixture_op.SCHEMA
    made = model(bodies, schema, feeds, activation, **(how.model_dump() if how else {}))
    want = mixture(*map(torch.from_numpy, feeds.values()), activation=activation).numpy()
    np.testing.assert_allclose(run(made, feeds), want, atol=1e-5)
    gate, up = np.split(feeds["hidden"].astype(float) @ feeds["shared_gate_up"].T, 2, axis=1)
    acted = np.vectorize(lambda x: definition(x, activation))(gate) * up
    np.testing.assert_allclose(want, wanted(feeds, bits, activation) + acted @ feeds["shared_down"].T, atol=1e-5)
