"""What the custom-op library and its loader refuse, each in one sentence that names the thing."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto
from ort_ops_helpers import CPU, experts_case, experts_model, library, route_feeds, route_model, session

from dmoe_export.bundle.reader import Bundle
from dmoe_export.errors import MissingRequirementError
from dmoe_export.ops.block_route.attributes import RouteAttributes
from dmoe_export.runtime.gpu import custom_ops as ort_custom_ops
from dmoe_export.runtime.gpu.custom_ops import check_session, choose_custom_ops, prepare_session

ATTRIBUTES = RouteAttributes("top_p", 8, 4, 4, 2, 2.5).node_attributes()
LOGITS, BIAS, POSITIONS = np.zeros((2, 6, 32)), np.zeros(32), np.zeros((2, 6))


def _half(bundle: Bundle) -> Bundle:
    """The bundle as if it were fp16: enough for what is refused before a session is made."""
    return Bundle(bundle.folder, bundle.manifest.model_copy(update={"precision": "fp16"}))


@pytest.mark.parametrize(("change", "text"), [
    ({"router_logits": np.zeros((2, 32))}, r"router_logits has shape \[2, 32\] where \[any, any, any\] is needed"),
    ({"expert_bias": np.zeros(31)}, r"expert_bias has shape \[31\] where \[32\] is needed"),
    ({"position_ids": np.zeros((2, 5))}, r"position_ids has shape \[2, 5\] where \[2, 6\] is needed"),
    ({"top_p": np.zeros(2)}, r"top_p has shape \[2\] where \[1\] is needed"),
    ({"min_experts": np.int64(3)}, r"min_experts has shape \[\] where \[1\] is needed"),
    ({"router_logits": np.zeros((2, 6, 2000)), "expert_bias": np.zeros(2000)}, r"experts 1\.\.1024"),
])
def test_route_refuses_wrong_shapes(change, text):
    feeds = route_feeds(LOGITS, BIAS, POSITIONS)
    feeds.update({name: np.asarray(value, feeds[name].dtype) for name, value in change.items()})
    with pytest.raises(Exception, match=f"DmoeBlockRoute: .*{text}"):
        session(route_model(ATTRIBUTES)).run(None, feeds)


@pytest.mark.parametrize(("change", "text"), [
    ({"mode": "best"}, "mode is 'best' where 'token', 'top_p' or 'top_c' is needed"),
    ({"score_function": "relu"}, "score_function is 'relu'"),
    ({"block_length": 1 << 40}, "attribute block_length is 1099511627776, not an int32"),
    ({"routed_scaling": None}, "routed_scaling"),
])
def test_route_refuses_wrong_attributes_when_it_is_loaded(change, text):
    attributes = {name: value for name, value in {**ATTRIBUTES, **change}.items() if value is not None}
    with pytest.raises(Exception, match=f"DmoeBlockRoute: .*{text}"):
        session(route_model(attributes))


def test_route_refuses_sizes_that_the_kernel_does_not_take():
    with pytest.raises(Exception, match=r"DmoeBlockRoute: an attribute does not fit: block length 1\.\.256"):
        session(route_model({**ATTRIBUTES, "block_length": 257})).run(None, route_feeds(LOGITS, BIAS, POSITIONS))


@pytest.mark.parametrize(("name", "shape", "text"), [
    ("hidden", (5, 2, 16), r"hidden has shape \[5, 2, 16\] where \[any, any\] is needed"),
    ("expert_ids", (4, 3), r"expert_ids has shape \[4, 3\] where \[5, any\] is needed"),
    ("expert_weights", (5, 2), r"expert_weights has shape \[5, 2\] where \[5, 3\] is needed"),
    ("gate_up", (8, 46, 32), r"gate_up has shape \[8, 46, 32\] where \[8, 48, 32\] is needed"),
    ("down", (8, 31, 24), r"down has shape \[8, 31, 24\] where \[any, 32, any\] is needed"),
])
def test_experts_refuse_wrong_shapes(name, shape, text):
    feeds = experts_case(5)
    feeds[name] = np.zeros(shape, feeds[name].dtype)
    with pytest.raises(Exception, match=f"DmoeExperts: {text}"):
        session(experts_model(TensorProto.FLOAT16)).run(None, feeds)


def test_experts_refuse_a_hidden_size_that_the_kernel_does_not_take():
    with pytest.raises(Exception, match=r"DmoeExperts: .*multiples of 8"):
        session(experts_model(TensorProto.FLOAT16)).run(None, experts_case(5, hidden=20))


def test_experts_refuse_float32():
    with pytest.raises(Exception, match=r"tensor\(float\).*\(hidden\) of operator \(DmoeExperts\).*is invalid"):
        session(experts_model(TensorProto.FLOAT))


def test_an_older_onnxruntime_is_told_so():
    """Its GetApi gives no API of the headers' version."""
    class Base(ctypes.Structure):
        _fields_ = [("get_api", ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)),
                    ("version", ctypes.CFUNCTYPE(ctypes.c_void_p))]

    runtime = ctypes.CDLL(str(next((Path(ort.__file__).parent / "capi").glob("libonnxruntime.so*"))))
    runtime.OrtGetApiBase.restype = ctypes.POINTER(Base)
    real = runtime.OrtGetApiBase().contents
    name = ctypes.create_string_buffer(b"1.14.0")
    old = Base(Base._fields_[0][1](lambda version: real.get_api(version) if version < 15 else None),
               Base._fields_[1][1](lambda: ctypes.addressof(name)))
    register = ctypes.CDLL(str(library())).RegisterCustomOps
    register.restype, register.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.POINTER(Base)]
    status = register(None, ctypes.byref(old))
    assert status
    api = ctypes.cast(real.get_api(1), ctypes.POINTER(ctypes.c_void_p))
    message = ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_void_p)(api[2])(status)  # GetErrorMessage is OrtApi's third
    assert b"newer than version 1.14.0 has; upgrade with" in message


def test_missing_library(sample_bundle, tmp_path):
    with pytest.raises(MissingRequirementError, match=r"nowhere\.so does not exist; build it with `make ort-ops`"):
        prepare_session(_half(sample_bundle), ort.SessionOptions(), tmp_path / "nowhere.so")


def test_a_file_that_is_no_library(sample_bundle, tmp_path):
    (tmp_path / "text.so").write_text("no library")
    with pytest.raises(MissingRequirementError, match=r"cannot use the kernels in .*text\.so.*`make ort-ops`"):
        prepare_session(_half(sample_bundle), ort.SessionOptions(), tmp_path / "text.so")


def test_fp32_bundle(sample_bundle):
    with pytest.raises(MissingRequirementError, match="has precision fp32, for which the custom op DmoeExperts has no"):
        prepare_session(sample_bundle, ort.SessionOptions(), library())


def test_a_library_for_another_provider():
    node = SimpleNamespace(op_type="DmoeExperts", domain="dmoe")
    part = SimpleNamespace(ep_name=CPU, get_nodes=lambda: [node])
    loaded = SimpleNamespace(get_provider_graph_assignment_info=lambda: [part])
    check_session(loaded, CPU)
    with pytest.raises(MissingRequirementError, match="DmoeExperts on CPUExecutionProvider where CUDA"):
        check_session(loaded, "CUDAExecutionProvider")


def test_choice(sample_bundle, monkeypatch, tmp_path):
    half = _half(sample_bundle)
    monkeypatch.setattr(ort_custom_ops, "INSTALLED", tmp_path / "lib.so")
    assert choose_custom_ops(half) == (None, "no custom-op library is installed")
    assert choose_custom_ops(half, "off") == (None, "custom ops are off")
    with pytest.raises(MissingRequirementError, match=r"lib\.so does not exist"):
        choose_custom_ops(half, "on")
    (tmp_path / "lib.so").touch()
    taken, why = choose_custom_ops(half)
    assert taken is None and "cannot use the kernels in" in why and "file too short" in why
    with pytest.raises(MissingRequirementError, match=r"file too short.*`make ort-ops`"):
        choose_custom_ops(half, "on")
    monkeypatch.setattr(ort_custom_ops, "INSTALLED", library())
    assert choose_custom_ops(half) == choose_custom_ops(half, "on") == (library().resolve(), "")
    assert choose_custom_ops(sample_bundle)[0] is None
    with pytest.raises(MissingRequirementError, match="precision fp32"):
        choose_custom_ops(sample_bundle, "on")
