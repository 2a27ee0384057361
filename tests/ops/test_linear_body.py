"""The linear op: its ONNX body against its eager implementation, as ONNX Runtime without a library of ours runs it."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from dmoe_export.ops.linear import SCHEMA
from dmoe_export.ops.linear.onnx_body import inline, linear_body
from dmoe_export.ops.schema import DOMAIN, OPSET

TYPES = {"float": (TensorProto.FLOAT, np.float32, 1e-6), "half": (TensorProto.FLOAT16, np.float16, 2**-10)}


def _model(kind: str, bias: bool, inlined: bool = False, alone: bool = False) -> onnx.ModelProto:
    """One node whose weights are inputs; `inlined`: as TensorRT gets it; `alone`: in a graph without another kind."""
    names, elem = list(SCHEMA.inputs[:2 + bias]), TYPES[kind][0]
    axes = {"x": ["N", "K"], "w": ["M", "K"], "b": ["M"], "y": ["N", "M"]}
    node = helper.make_node(SCHEMA.name, names, list(SCHEMA.outputs), name="one", domain=DOMAIN)
    if inlined:
        inline(node)
    values = {name: helper.make_tensor_value_info(name, elem, axes[name]) for name in (*names, "y")}
    graph = helper.make_graph([node], "g", [values[name] for name in names], [values["y"]])
    body = [] if inlined else [linear_body(bias or not alone)]
    return helper.make_model(graph, ir_version=10, functions=body, opset_imports=[
        helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, SCHEMA.version)])


def _session(model: onnx.ModelProto, level: ort.GraphOptimizationLevel) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def sessions():
    levels = (ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ort.GraphOptimizationLevel.ORT_ENABLE_ALL)
    return {(kind, bias): [_session(_model(kind, bias), level) for level in levels]
            + [_session(_model(kind, bias, inlined=True), levels[0]),
               _session(_model(kind, bias, alone=True), levels[1])] for kind in TYPES for bias in (False, True)}


@given(kind=st.sampled_from(sorted(TYPES)), bias=st.booleans(), n=st.integers(0, 9), k=st.integers(1, 40),
       m=st.integers(1, 20), seed=st.integers(0, 99))
def test_body_is_the_eager_op(sessions, kind, bias, n, k, m, seed):
    """On every optimisation level, with the bias left out and given, and as the node that stands for it."""
    rng, (_, dtype, tolerance) = np.random.default_rng(seed), TYPES[kind]
    feeds = {name: rng.normal(size=shape).astype(dtype)
             for name, shape in (("x", (n, k)), ("w", (m, k)), ("b", (m,)))[:2 + bias]}
    want = torch.nn.functional.linear(*(torch.from_numpy(value) for value in feeds.values())).numpy()
    size = np.abs(feeds["x"]).astype(np.float64) @ np.abs(feeds["w"]).astype(np.float64).T + 3
    for session in sessions[kind, bias]:
        (got,) = session.run(None, feeds)
        assert got.dtype == dtype and got.shape == want.shape
        assert (np.abs(got.astype(np.float64) - want) <= tolerance * size).all()


@pytest.mark.parametrize("bias", [False, True])
def test_models_with_the_op_pass_the_checker(bias):
    for inlined in (False, True):
        model = _model("half", bias, inlined)
        onnx.checker.check_model(model, full_check=True)
        (node,) = model.graph.node
        assert node.name == "one" and (node.op_type, node.domain) == (
            ("Gemm", "") if inlined else (SCHEMA.name, DOMAIN))
