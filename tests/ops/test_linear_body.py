"""The linear ops: their ONNX bodies against float64, as ONNX Runtime without a library of ours runs them."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from linear_helpers import ALL, ROUNDING, case, elem_type, linear_node, on_onnxruntime
from onnx import helper

from dmoe_export.ops.experts.quantised import dequantise
from dmoe_export.ops.linear import SCHEMA
from dmoe_export.ops.linear.onnx_body import inline, linear_body, quantised_linear_body
from dmoe_export.ops.schema import DOMAIN, OPSET

LEVELS = (ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ort.GraphOptimizationLevel.ORT_ENABLE_ALL)
NARROW = ("half weights", "bfloat weights")


def _model(kind: str, feeds: dict[str, np.ndarray], constant: bool, inlined: bool = False,
           alone: bool = False) -> onnx.ModelProto:
    """One node; `constant`: its weights are initializers, as in a bundle, which ONNX Runtime casts and packs.

    `inlined`: as TensorRT gets it; `alone`: in a graph without another kind of node.
    """
    values, weights, bits = ALL[kind]
    bias = "b" in feeds
    node = linear_node(bias, kind, feeds["w"].shape[0], feeds["x"].shape[1])
    node.name = "one"
    if inlined:
        inline(node)
    types = {name: elem_type(weights if name == "w" else values) for name in node.input}
    given = [name for name in node.input if name == "x" or not constant]
    inputs = [helper.make_tensor_value_info(name, types[name], ["N", feeds["x"].shape[1]] if name == "x"
                                            else feeds[name].shape) for name in given]
    constants = [helper.make_tensor(name, types[name], feeds[name].shape, feeds[name].tobytes(), raw=True)
                 for name in node.input if name not in given]
    output = helper.make_tensor_value_info("y", elem_type(values), ["N", feeds["w"].shape[0]])
    body = quantised_linear_body() if bits else linear_body(bias or not alone, kind in NARROW or not alone)
    return helper.make_model(
        helper.make_graph([node], "g", inputs, [output], constants), ir_version=10, functions=[] if inlined else [body],
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, SCHEMA.version)])


def _run(model: onnx.ModelProto, feeds: dict[str, np.ndarray], level: ort.GraphOptimizationLevel) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level, options.intra_op_num_threads = level, 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    values = {entry.name: on_onnxruntime(feeds[entry.name]) for entry in session.get_inputs()}
    return session.run_with_ort_values(None, values)[0].numpy()


def _exact(kind: str, feeds: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """y in float64, and the sum of its products' sizes."""
    exact = {name: value.astype(np.float64) for name, value in feeds.items()}
    if bits := ALL[kind].bits:
        exact["w"] = dequantise(*(torch.from_numpy(feeds[name]) for name in ("w", "scales")), bits).double().numpy()
    size = np.abs(exact["x"]) @ np.abs(exact["w"]).T + 3
    return exact["x"] @ exact["w"].T + exact.get("b", 0), size


@given(kind=st.sampled_from(sorted(ALL)), bias=st.booleans(), n=st.integers(0, 9), k=st.integers(1, 40),
       m=st.integers(1, 20), seed=st.integers(0, 99), constant=st.booleans(), level=st.sampled_from(LEVELS))
def test_body_is_the_op(kind, bias, n, k, m, seed, constant, level):
    """On every optimisation level, with the bias left out and given, and as the node that stands for it."""
    feeds = case(n, 32 * k if ALL[kind].bits else k, m, bias, seed, kind)
    want, size = _exact(kind, feeds)
    same = kind not in NARROW and not ALL[kind].bits
    ways = [{}, *([{"alone": True}, {"inlined": True}] if same else [])]
    for way in ways:
        got = _run(_model(kind, feeds, constant, **way), feeds, level)
        assert got.dtype == ALL[kind].values and got.shape == want.shape
        assert (np.abs(got - want) <= (2e-6 + 4 * ROUNDING[ALL[kind].values]) * size).all()


@cache
def _small(kind: str, bias: bool) -> dict[str, np.ndarray]:
    return case(3, 64, 5, bias, 0, kind)


def test_one_body_serves_a_graph():
    """Nodes of 4 and of 8 bits, with and without a bias, side by side."""
    nodes, inputs, feeds, wants = [], [], {}, []
    for i, (kind, bias) in enumerate([("int8", True), ("int4", False), ("int4", True), ("int8", False)]):
        some = _small(kind, bias)
        node = linear_node(bias, kind, 5, 64)
        for name, value in some.items():
            feeds[f"{name}{i}"] = value
            inputs.append(helper.make_tensor_value_info(f"{name}{i}", elem_type(value.dtype.type), value.shape))
        node.input[:], node.output[:] = [f"{name}{i}" for name in node.input], [f"y{i}"]
        nodes.append(node)
        wants.append(_exact(kind, some)[0])
    outputs = [helper.make_tensor_value_info(f"y{i}", 1, [3, 5]) for i in range(4)]
    model = helper.make_model(helper.make_graph(nodes, "g", inputs, outputs), ir_version=10,
                              functions=[quantised_linear_body()], opset_imports=[
                                  helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)])
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for got, want in zip(session.run(None, feeds), wants, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["half", "bfloat weights", "int4"])
def test_models_with_the_op_pass_the_checker(kind, bias):
    for inlined in (False, True) if kind == "half" else (False,):
        model = _model(kind, _small(kind, bias), False, inlined)
        onnx.checker.check_model(model, full_check=kind != "int4")  # it knows no op of another domain than its own
        (node,) = model.graph.node
        assert node.name == "one" and (node.op_type, node.domain) == (
            ("Gemm", "") if inlined else (node.op_type, DOMAIN))
