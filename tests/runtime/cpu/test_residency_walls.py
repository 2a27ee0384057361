"""Walls at the experts of a half-precision graph: any graph gives the same bits whole and in pieces."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from cpu_ops_helpers import built
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from dmoe_export.errors import BundleError
from dmoe_export.ops.schema import DOMAIN, OPSET
from dmoe_export.runtime.cpu import library as cpu_ops
from dmoe_export.runtime.cpu import pieces
from dmoe_export.runtime.cpu import session as onnxruntime_session
from dmoe_export.runtime.cpu.onnxruntime_pieces import PieceSession
from dmoe_export.runtime.cpu.session import open_session
from dmoe_export.runtime.cpu.walls import wall_at_experts

HIDDEN, WIDTH, EXPERTS, TOKENS = 16, 8, 4, 5
HALF, FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT
# Operators with and without half-precision kernels in ONNX Runtime, all [N, H] → [N, H].
OPERATORS = ("Add", "Mul", "Sub", "Sigmoid", "RMSNormalization", "Gemm", "Slice", "Transpose", "Unsqueeze", "Softmax",
             "Where", "MatMul", "Identity")


class Graph:
    """A half-precision graph, value by value."""

    def __init__(self, seed):
        self.random, self.nodes, self.kinds = np.random.default_rng(seed), [], {"x": HALF}
        self.weights = {f"w{i}": (self.random.normal(size=(HIDDEN, HIDDEN)) / 4).astype(np.float16) for i in range(2)}
        self.weights |= {"norm": self.random.normal(1, 0.1, HIDDEN).astype(np.float16), "one": np.array([1]),
                         "zero": np.array([0]), "all": np.array([HIDDEN]), "half": np.array([HIDDEN // 2]),
                         "rows": np.array([True, False, True, True, False])[:, None]}
        self.experts = []

    def add(self, op, inputs, kind=HALF, domain="", **attributes):
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], name=name, domain=domain, **attributes))
        self.kinds[name] = kind
        return name

    def put(self, op, a, b):
        """One of OPERATORS over one or two earlier values."""
        if op in ("Add", "Mul", "Sub"):
            return self.add(op, [a, b])
        if op == "Where":
            return self.add(op, ["rows", a, b])
        if op in ("Gemm", "MatMul"):
            return self.add(op, [a, "w0"]) if op == "MatMul" else self.add(op, [a, "w1"], transB=1)
        if op == "RMSNormalization":
            return self.add(op, [a, "norm"])
        if op == "Slice":  # halves swapped
            parts = [self.add(op, [a, *ends, "one"]) for ends in (("half", "all"), ("zero", "half"))]
            return self.add("Concat", parts, axis=1)
        if op == "Transpose":
            return self.add(op, [self.add(op, [a], perm=[1, 0])], perm=[1, 0])
        if op == "Unsqueeze":
            return self.add("Squeeze", [self.add(op, [a, "one"]), "one"])
        if op == "Softmax":  # in float32, as attention and router are
            return self.add("Cast", [self.add(op, [self.add("Cast", [a], FLOAT, to=FLOAT)], FLOAT)], to=HALF)
        return self.add(op, [a])

    def mixture(self, a):
        """Experts over an earlier value."""
        index = len(self.experts)
        shapes = (EXPERTS, 2 * WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH)
        self.experts.append([(self.random.normal(size=shape) / 2).astype(np.float16) for shape in shapes])
        names = [f"experts{index}.{part}" for part in ("gate_up", "down")]
        self.weights |= zip(names, self.experts[-1], strict=True)
        routed = [self.add("Max", ["ids"], TensorProto.INT32), self.add("Max", ["chosen"], FLOAT)]  # made by a piece
        return self.add("DmoeExperts", [a, *routed, *names], domain=DOMAIN)

    def model(self, outputs, declared=True):
        """With types declared, as exported graphs have them; `outputs` are [N, H]."""
        make = helper.make_tensor_value_info
        known = self.kinds.items() if declared else ()
        middle = [make(name, kind, None) for name, kind in known if name not in ("x", *outputs)]
        inputs = [make("x", HALF, [TOKENS, HIDDEN]), make("ids", TensorProto.INT32, [TOKENS, 2]),
                  make("chosen", FLOAT, [TOKENS, 2])]
        outputs = [make(name, HALF, [TOKENS, HIDDEN]) for name in outputs]
        weights = [numpy_helper.from_array(array, name) for name, array in self.weights.items()]
        body = helper.make_function(
            DOMAIN, "DmoeExperts", ["hidden", "ids", "chosen", "gate_up", "down"], ["mixed"],
            [helper.make_node("Identity", ["hidden"], ["mixed"])], [helper.make_opsetid("", OPSET)])
        graph = helper.make_graph(self.nodes, "random", inputs, outputs, weights, value_info=middle)
        return helper.make_model(graph, functions=[body], ir_version=10, opset_imports=[
            helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)])


class Source:
    """Experts in groups of any make."""

    def __init__(self, graph):
        self.graph = graph

    def weights(self, layer):
        return self.graph.experts[layer]

    def groups(self, layer, experts):
        pick = self.graph.random.integers(0, 2, len(experts)).astype(bool)
        for group in (experts[pick], experts[~pick]):
            if len(group):
                yield group


def _saved(graph, folder, outputs, declared=True):
    """As a bundle."""
    path = folder / "graph.onnx"
    onnx.save(graph.model(outputs, declared), path)
    model = SimpleNamespace(moe_layers=graph.experts)
    return SimpleNamespace(denoiser_path=path, folder=folder,
                           manifest=SimpleNamespace(precision="fp16", quantisation=None, model=model, files=[]))


def _both(graph, outputs, folder):
    """Outputs of the whole graph and of its pieces."""
    bundle, random = _saved(graph, folder, outputs), np.random.default_rng(1)
    whole, cut = open_session(str(bundle.denoiser_path), bundle, 1), PieceSession(bundle, 1, source=Source(graph))
    feeds = {"x": random.normal(size=(TOKENS, HIDDEN)).astype(np.float16),
             "ids": np.stack([random.permutation(EXPERTS)[:2] for _ in range(TOKENS)]).astype(np.int32),
             "chosen": random.random((TOKENS, 2)).astype(np.float32)}
    feeds["ids"][1, 1] = feeds["ids"][3] = -1
    return [np.stack(session.run(outputs, feeds)) for session in (whole, cut)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_ops, "INSTALLED", built())
        yield tmp_path_factory.mktemp("walls")


_STEPS = st.lists(st.tuples(st.sampled_from(OPERATORS), st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=6)


@settings(max_examples=150, deadline=None)
@given(st.lists(_STEPS, min_size=2, max_size=4), st.integers(0, 99))
def test_any_graph_gives_the_same_bits(folder, parts, seed):
    """Steps, a mixture, steps … over values of this part and of earlier ones."""
    graph, outputs = Graph(seed), []
    values = [graph.put("Sigmoid", "x", "x")]  # what two parts make of an input would be made once in the whole
    for number, steps in enumerate(parts):
        if number:
            values.append(graph.mixture(values[-1 - steps[0][1] % len(values)]))
        for op, a, b in steps:
            values.append(graph.put(op, values[-1 - a % len(values)], values[-1 - b % len(values)]))
        outputs.append(values[-1])
    np.testing.assert_array_equal(*_both(graph, outputs, folder))


def _layers():
    """Two layers as models have them: a residual stream, its norm, experts."""
    graph, stream = Graph(0), "x"
    for _ in range(2):
        stream = graph.put("Add", graph.put("Gemm", graph.put("RMSNormalization", stream, ""), ""), stream)
        stream = graph.put("Add", graph.mixture(graph.put("RMSNormalization", stream, "")), stream)
    return graph, [stream]


def test_layers_need_walls(folder, monkeypatch):
    np.testing.assert_array_equal(*_both(*_layers(), folder))
    for module in (onnxruntime_session, pieces):
        monkeypatch.setattr(module, "wall_at_experts", lambda model: model)
    monkeypatch.setattr(pieces._Cutter, "half_inputs", lambda cutter, all: [])
    whole, cut = _both(*_layers(), folder)
    assert (whole != cut).any()


def test_a_wall_changes_no_number():
    """None that is half precision, infinities and the smallest ones among them."""
    graph = Graph(0)
    graph.add("Neg", [graph.mixture(graph.add("Neg", ["x"]))])
    model = onnx.load_from_string(wall_at_experts(graph.model([]).SerializeToString()))
    onnx.checker.check_model(model)
    kinds = [node.op_type for node in model.graph.node]
    wall = ["Cast", "Sum", "Sum", "Cast", "Max"]
    assert kinds == ["Neg", *wall[:2], "Max", "Max", *wall[2:], "DmoeExperts", *wall, "Neg"]
    nodes = model.graph.node[-6:-1]
    ends = [helper.make_tensor_value_info(name, HALF, [None]) for name in (nodes[0].input[0], nodes[-1].output[0])]
    alone = helper.make_model(helper.make_graph(nodes, "wall", ends[:1], ends[1:]), ir_version=10,
                              opset_imports=[helper.make_opsetid("", OPSET)])
    session = ort.InferenceSession(alone.SerializeToString(), providers=["CPUExecutionProvider"])
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    np.testing.assert_array_equal(session.run(None, {ends[0].name: every})[0], every)


def test_float32_needs_none(golden_bundle):
    model = golden_bundle.denoiser_path.read_bytes()
    assert wall_at_experts(model) == model
    with pytest.raises(ValueError, match="ends inside a field"):
        wall_at_experts(model[:1000])


def test_undeclared_types_are_told(folder):
    """Without them we would not know where a wall is needed."""
    graph, outputs = _layers()
    bundle = _saved(graph, folder, outputs, declared=False)
    with pytest.raises(BundleError, match=r"does not declare the type of v\d+, which is half precision"):
        PieceSession(bundle, 1)
