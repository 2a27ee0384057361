"""Linear layers on the CPU kernels: against float64 at any size, and in whole models."""

from __future__ import annotations

import os
import subprocess
import sys

import linear_helpers as helpers
import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from cpu_ops_helpers import built
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_helpers import ALL, KINDS, QUANTISED, TOLERANCE, case, error, run
from onnx import TensorProto

from dmoe_export import export_checkpoint
from dmoe_export.checkpoint.synthetic import GEOMETRIES, write_synthetic
from dmoe_export.errors import BundleError
from dmoe_export.runtime.backend import ForwardInputs
from dmoe_export.runtime.cpu import library as cpu_ops
from dmoe_export.runtime.cpu.backend import OnnxRuntimeBackend
from dmoe_export.runtime.cpu.session import CpuSession
from dmoe_export.runtime.library import Kernels


@pytest.mark.parametrize("isa", ["avx512", "avx2", "generic"])
def test_every_instruction_set(isa):
    subprocess.run([sys.executable, helpers.__file__, str(built())], check=True, timeout=200,
                   env=os.environ | {"DMOE_CPU_ISA": isa, "OMP_NUM_THREADS": "1"})


@settings(deadline=None, max_examples=80)
@given(st.integers(0, 100), st.integers(1, 300), st.integers(1, 260), st.booleans(), st.integers(0, 99),
       st.sampled_from(list(KINDS)))
def test_any_size(tokens, columns, rows, bias, seed, kind):
    assert error(built(), case(tokens, columns, rows, bias, seed, kind), kind) < TOLERANCE


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 130), st.integers(1, 5), st.integers(1, 200), st.booleans(), st.integers(0, 99),
       st.sampled_from(list(QUANTISED)), st.sampled_from([32, 64, 128]))
def test_any_group(tokens, groups, rows, bias, seed, kind, group):
    feeds = case(tokens, groups * group, rows, bias, seed, kind, group)
    assert error(built(), feeds, kind, group) < TOLERANCE


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 130), st.integers(1, 200), st.integers(1, 200), st.booleans(), st.integers(0, 99),
       st.sampled_from(["half weights", "bfloat weights"]))
def test_narrow_weights_are_exact(tokens, columns, rows, bias, seed, kind):
    """The same bits as with these weights in float32."""
    feeds = case(tokens, columns, rows, bias, seed, kind)
    got = run(built(), feeds, kind)
    np.testing.assert_array_equal(got, run(built(), feeds | {"w": feeds["w"].astype(np.float32)}))


def test_every_bfloat16():
    """Subnormal numbers, infinities and NaN, too."""
    every = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16)[:, None]
    want = every.astype(np.float32)[:, 0]
    for tokens in (1, 40):  # one column: no sum is in the way; x · w + 0
        got = run(built(), {"x": np.ones((tokens, 1), np.float32), "w": every}, "bfloat weights")
        np.testing.assert_array_equal(got, np.tile(want, (tokens, 1)))


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
        got = run(built(), {"x": np.tile(x, (tokens, 1)), "w": w}, "half")
        np.testing.assert_array_equal(got, np.tile(want, (tokens, 1)))


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(("columns", "rows"), [(192, 130), (2080, 41)])
def test_a_token_does_not_depend_on_the_others(columns, rows, kind):
    """Bit for bit, whatever their number: dot products and panels, whole and not, have one order of sums."""
    feeds = case(161, columns, rows, kind=kind)
    want = run(built(), feeds, kind)
    for tokens in (1, 3, 16, 23, 24, 25, 32, 33, 47, 64, 96, 128, 129):
        np.testing.assert_array_equal(run(built(), feeds | {"x": feeds["x"][:tokens].copy()}, kind), want[:tokens])
    np.testing.assert_array_equal(run(built(), feeds | {"x": feeds["x"][::-1].copy()}, kind)[::-1], want)
    feeds["x"][1:] = np.nan
    np.testing.assert_array_equal(run(built(), feeds, kind)[0], want[0])


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


@pytest.mark.parametrize(("change", "words"), [
    (lambda f: f.update(w=f["w"][:, 1:].copy()), r"w has shape \[9, 31\] where \[any, 32\]"),
    (lambda f: f.update(scales=f["scales"][:, 1:].copy()), r"scales has shape \[9, 1\] where \[9, 2\]"),
    (lambda f: f.update(b=f["b"][1:].copy()), r"b has shape \[8\] where \[9\]"),
    (lambda f: f.update(x=f["x"][:, :40].copy(), w=f["w"][:, :20].copy()),
     "group_size 32 does not divide the columns 40"),
])
def test_wrong_quantised_inputs_are_refused(change, words):
    feeds = case(5, 64, 9, bias=True, kind="int4")
    change(feeds)
    with pytest.raises(Exception, match=words):
        run(built(), feeds, "int4")


def test_wrong_groups_are_refused():
    for group in (20, 0, -32, 2**31, 2**62):
        with pytest.raises(Exception, match=f"bits 8 and group_size {group} are not offered"):
            helpers.session(built(), False, "int8", group)


@pytest.mark.parametrize(("tokens", "kind"), [(3, "float"), (40, "float"), (3, "bfloat weights"), (40, "int4")])
def test_weight_file_cut_short_while_it_is_read(tokens, kind, tiny_bundle, tmp_path):
    """Neither a crash nor a number, then and later."""
    feeds = {"x": np.ones((tokens, 64), np.float32)}
    weights = np.ones((16384, 64), helpers.ALL[kind].weights)
    if kind == "int4":
        weights = np.full((16384, 32), 0x99, np.uint8)  # 1 and 1
        feeds["scales"] = np.ones((16384, 2), np.float32)
    weights.tofile(tmp_path / "w.bin")
    tensor = TensorProto(name="w", data_type=helpers.elem_type(weights.dtype.type), dims=weights.shape,
                         data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="w.bin")
    model = onnx.load_from_string(helpers.linear_model(bias=False, kind=kind))
    model.graph.initializer.append(tensor)
    del model.graph.input[1]
    onnx.save(model, tmp_path / "model.onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(built()))
    raw = ort.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
    session = CpuSession(raw, "denoiser.onnx", tiny_bundle, None, Kernels([], ""), None)
    assert (session.run(["y"], feeds)[0] == 64).all()
    os.truncate(tmp_path / "w.bin", 8192)
    for _ in range(2):
        with pytest.raises(BundleError, match=r"denoiser\.onnx\.data was changed or removed while it was in use"):
            session.run(["y"], feeds)


@pytest.mark.parametrize("geometry", ["tiny", "llada-tiny", "dream-tiny"])
def test_whole_models(geometry, tmp_path, monkeypatch):
    """Logits are as without the kernels."""
    monkeypatch.setattr(cpu_ops, "INSTALLED", built())
    write_synthetic(tmp_path / "checkpoint", GEOMETRIES[geometry])
    bundle = export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle")
    logits = [_logits(OnnxRuntimeBackend(bundle, 1, cpu_ops=wanted)) for wanted in ("on", "off")]
    np.testing.assert_allclose(*logits, rtol=0, atol=2e-4 * np.abs(logits[1]).max())


def _logits(backend) -> np.ndarray:
    ids = np.arange(40)[None] % backend.description.vocab_size
    every = np.arange(40)[None]
    out = backend.forward(ForwardInputs(ids, every, every, {}, want_logits=True), backend.new_cache(1))
    assert out.logits is not None
    return out.logits
