"""Linear layers on the CPU kernels: against float64 at any size, and where the runtime puts the op."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter

import linear_helpers as helpers
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from cpu_ops_helpers import built
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_helpers import KINDS, TOLERANCE, case, error, run
from onnx import TensorProto, helper, numpy_helper

from dmoe_export import export_checkpoint
from dmoe_export.checkpoint.synthetic import GEOMETRIES, write_synthetic
from dmoe_export.errors import BundleError, MissingRequirementError
from dmoe_export.ops.schema import DOMAIN, OPSET
from dmoe_export.runtime.backend import ForwardInputs
from dmoe_export.runtime.cpu import library as cpu_ops
from dmoe_export.runtime.cpu import linear_layers
from dmoe_export.runtime.cpu.backend import OnnxRuntimeBackend
from dmoe_export.runtime.cpu.linear_layers import LINEAR, with_linear
from dmoe_export.runtime.cpu.session import run_session


@pytest.mark.parametrize("isa", ["avx512", "avx2", "generic"])
def test_every_instruction_set(isa):
    subprocess.run([sys.executable, helpers.__file__, str(built())], check=True, timeout=200,
                   env=os.environ | {"DMOE_CPU_ISA": isa, "OMP_NUM_THREADS": "1"})


@settings(deadline=None, max_examples=80)
@given(st.integers(0, 100), st.integers(1, 300), st.integers(1, 260), st.booleans(), st.integers(0, 99),
       st.sampled_from(list(KINDS)))
def test_any_size(tokens, columns, rows, bias, seed, kind):
    assert error(built(), case(tokens, columns, rows, bias, seed, kind)) < TOLERANCE


def test_half_precision_at_its_ends():
    """Overflow, subnormal numbers, ties to even, infinity and NaN, as numpy rounds."""
    tiny = 2.0**-24
    terms = [(60000, 5504), (60000, 5504, 15), (60000, 5504, 16), (60000, 60000), (-60000, -60000), (2048, 1),
             (2048, 3), (tiny,), (0, 0, 0, tiny), (0, 0, 0, 3 * tiny), (np.inf,), (np.nan,)]
    x, w = np.array([1, 1, 1, 0.5, *[0] * 28], np.float16), np.zeros((len(terms), 32), np.float16)
    for row, values in zip(w, terms, strict=True):
        row[:len(values)] = values
    with np.errstate(over="ignore", invalid="ignore"):
        want = (w.astype(np.float32) @ x.astype(np.float32)).astype(np.float16)
    for tokens in (1, 40):
        got = run(built(), {"x": np.tile(x, (tokens, 1)), "w": w})
        np.testing.assert_array_equal(got, np.tile(want, (tokens, 1)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [17, 64, 100])
def test_a_token_does_not_depend_on_the_others(tokens, kind):
    """Bit for bit, as long as there are more of them than a vector has lanes."""
    feeds = case(tokens, 200, 130, kind=kind)
    want = run(built(), feeds)
    np.testing.assert_array_equal(run(built(), feeds | {"x": feeds["x"][::-1].copy()})[::-1], want)
    feeds["x"][1:] = np.nan
    np.testing.assert_array_equal(run(built(), feeds)[0], want[0])


@pytest.mark.parametrize(("change", "words"), [
    (lambda f: f.update(x=f["x"][0]), r"x has shape \[24\] where \[any, any\]"),
    (lambda f: f.update(w=f["w"][:, 1:].copy()), r"w has shape \[9, 23\] where \[any, 24\]"),
    (lambda f: f.update(b=f["b"][1:].copy()), r"b has shape \[8\] where \[9\]"),
])
def test_wrong_inputs_are_refused(change, words):
    feeds = case(5, 24, 9, bias=True)
    change(feeds)
    with pytest.raises(Exception, match=words):
        run(built(), feeds)


@pytest.mark.parametrize("tokens", [3, 40])
def test_weight_file_cut_short_while_it_is_read(tokens, tiny_bundle, tmp_path):
    """Neither a crash nor a number, then and later."""
    weights = np.ones((4096, 64), np.float32)
    weights.tofile(tmp_path / "w.bin")
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=weights.shape,
                         data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="w.bin")
    model = onnx.load_from_string(helpers.linear_model(bias=False))
    model.graph.initializer.append(tensor)
    del model.graph.input[1]
    onnx.save(model, tmp_path / "model.onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(built()))
    session = ort.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
    feeds = {"x": np.ones((tokens, 64), np.float32)}
    assert (run_session(session, tiny_bundle, ["y"], feeds)[0] == 64).all()
    os.truncate(tmp_path / "w.bin", 8192)
    for _ in range(2):
        with pytest.raises(BundleError, match=r"denoiser\.onnx\.data was changed or removed while it was in use"):
            run_session(session, tiny_bundle, ["y"], feeds)


def _gemms(node: dict, weight=(6, 4), dtype=np.float32, bias=(6,), given=False, imports=True) -> bytes:
    """x [T, 4] and one Gemm; `given`: its weight is an input."""
    inputs = [helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), ["T", 4])]
    stored = [("w", np.ones(weight, dtype)), ("b", np.ones(bias, dtype))][:len(node.pop("inputs", "xw")) - 1]
    if given:
        inputs.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, weight))
        stored = stored[1:]
    names = ["x", "w", "b"][:len(stored) + 1 + given]
    graph = helper.make_graph([helper.make_node("Gemm", names, ["y"], **node)], "g", inputs,
                              [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
                              [numpy_helper.from_array(array, name) for name, array in stored])
    opsets = [helper.make_opsetid("", OPSET), *([helper.make_opsetid(DOMAIN, 1)] if imports else [])]
    return helper.make_model(graph, ir_version=10, opset_imports=opsets).SerializeToString()


@pytest.mark.parametrize("model", [
    _gemms({"transB": 1}),
    _gemms({"transB": 1}, imports=False),
    _gemms({"transB": 1}, dtype=np.float16),
    _gemms({"transB": 1, "inputs": "xwb", "alpha": 1.0, "beta": 1.0, "transA": 0}),
])
def test_a_linear_layer_becomes_the_op(model):
    rest, before = onnx.load_from_string(with_linear(model)), onnx.load_from_string(model)
    (node,), (gemm,) = rest.graph.node, before.graph.node
    assert (node.op_type, node.domain, len(node.attribute)) == (LINEAR, DOMAIN, 0)
    assert (node.input, node.output, node.name) == (gemm.input, gemm.output, gemm.name)
    assert sorted((o.domain, o.version) for o in rest.opset_import) == [("", OPSET), (DOMAIN, 1)]
    rest.graph.node[0].CopyFrom(gemm)
    assert rest.graph == before.graph


@pytest.mark.parametrize("model", [
    _gemms({}, weight=(4, 6)),
    _gemms({"transB": 1, "transA": 1}),
    _gemms({"transB": 1, "alpha": 0.5}),
    _gemms({"transB": 1, "beta": 2.0, "inputs": "xwb"}),
    _gemms({"transB": 1}, given=True),
    _gemms({"transB": 1}, dtype=np.float64),
    _gemms({"transB": 1, "inputs": "xwb"}, bias=(1, 6)),
    _gemms({"transB": 1, "domain": "elsewhere"}),
], ids=["not transposed", "transA", "alpha", "beta", "an input", "double", "bias of two axes", "elsewhere"])
def test_another_gemm_stays(model):
    assert with_linear(model) is model


def test_no_model():
    with pytest.raises(ValueError, match="wire type"):
        with_linear(b"\x0f")


@pytest.mark.parametrize("geometry", ["tiny", "llada-tiny", "dream-tiny"])
def test_whole_models(geometry, tmp_path, monkeypatch):
    """Every linear layer is the op's, and logits are as without it."""
    monkeypatch.setattr(cpu_ops, "INSTALLED", built())
    write_synthetic(tmp_path / "checkpoint", GEOMETRIES[geometry])
    bundle = export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle")
    model = bundle.denoiser_path.read_bytes()
    before, after = (Counter(node.op_type for node in onnx.load_from_string(m).graph.node)
                     for m in (model, with_linear(model)))
    assert after["Gemm"] == 0 < before["Gemm"] == after[LINEAR]
    logits = [_logits(OnnxRuntimeBackend(bundle, 1, cpu_ops=wanted)) for wanted in ("on", "off")]
    np.testing.assert_allclose(*logits, rtol=0, atol=2e-4 * np.abs(logits[1]).max())


def test_a_library_of_older_sources(tiny_bundle, monkeypatch):
    monkeypatch.setattr(cpu_ops, "INSTALLED", built())
    monkeypatch.setattr(linear_layers, "LINEAR", "DmoeNewer")
    with pytest.raises(MissingRequirementError, match="do not fit this program; build them again with `make cpu-ops`"):
        OnnxRuntimeBackend(tiny_bundle)


def _logits(backend) -> np.ndarray:
    ids = np.arange(40)[None] % backend.description.vocab_size
    every = np.arange(40)[None]
    out = backend.forward(ForwardInputs(ids, every, every, {}, want_logits=True), backend.new_cache(1))
    assert out.logits is not None
    return out.logits
