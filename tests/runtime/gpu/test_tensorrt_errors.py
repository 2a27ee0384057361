"""Engines, libraries and machines that do not fit: one sentence each, on a stand-in for TensorRT."""

from __future__ import annotations

import json
import sys

import pytest
from tensorrt_helpers import Setup, bundle_with_engine, changed

from dmoe_export.bundle.reader import Bundle
from dmoe_export.errors import BundleError, MissingRequirementError
from dmoe_export.runtime.gpu.device import DeviceMemoryError
from dmoe_export.runtime.gpu.tensorrt import open_tensorrt


@pytest.fixture(scope="module")
def engines(golden_bundle, tmp_path_factory):
    return bundle_with_engine(golden_bundle, tmp_path_factory.mktemp("b") / "engines")


REFUSED = [
    ({"version": "11.2.0.1"}, MissingRequirementError,
     "Engine a.engine was built with TensorRT 11.2.0.1, installed is TensorRT 11.4.0.0; install 11.2.0.1"),
    ({"targets": ["sm80", "sm120"]}, MissingRequirementError,
     r"Engine a.engine is for sm80, sm120, this machine has Host Memory \(sm89\); .* --targets sm89"),
    ({"file": "nowhere.engine"}, BundleError, "nowhere.engine cannot be read"),
    ({"precision": "fp16"}, BundleError, "has a tensor past_key.0 of type FLOAT, the bundle's graph has HALF there"),
]


@pytest.mark.parametrize(("updates", "kind", "sentence"), REFUSED, ids=[next(iter(r[0])) for r in REFUSED])
def test_engines_that_do_not_fit(monkeypatch, engines, updates, kind, sentence):
    with pytest.raises(kind, match=sentence) as caught:
        Setup(monkeypatch, changed(engines, **updates)).open()
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_flags_that_widen_what_fits(monkeypatch, engines):
    wide = changed(engines, version="11.2.0.1", targets=["sm80"], flags=["version-compatible", "hardware-compatible"])
    Setup(monkeypatch, wide).open()
    with pytest.raises(MissingRequirementError, match=r"\(sm75\)"):
        Setup(monkeypatch, wide, capability=(7, 5)).open()
    with pytest.raises(MissingRequirementError, match=r"built with TensorRT 10\.2"):
        Setup(monkeypatch, changed(wide, version="10.2")).open()


@pytest.mark.parametrize("rtx", [False, True])
@pytest.mark.parametrize("length", [0, 40])
def test_truncated_engine(monkeypatch, engines, rtx, length):
    name = f"cut{length}.engine"
    (engines.folder / name).write_bytes((engines.folder / "a.engine").read_bytes()[:length])
    sentence = f"{name} of 40 bytes cannot be opened by TensorRT" if length else f"{name} is empty"
    with pytest.raises(BundleError, match=sentence) as caught:
        Setup(monkeypatch, changed(engines, file=name), rtx=rtx).open()
    assert ("malformed engine" in str(caught.value)) == (rtx and length > 0)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


def test_a_machine_that_cannot_is_not_the_file_s_fault(monkeypatch, engines):
    setup = Setup(monkeypatch, engines)
    setup.trt.trouble = "[x.cpp::y::2] Error Code 1: Cuda Runtime (out of memory)"
    with pytest.raises(MissingRequirementError, match=r"on this machine \(.*out of memory\)\); update the NVIDIA"):
        setup.open()


def test_embedded_plugin_library_that_does_not_load(monkeypatch, engines):
    setup = Setup(monkeypatch, engines, rtx=True)
    setup.trt.embedded_loads = False
    with pytest.raises(MissingRequirementError, match=r"needs the dmoe plugin library of build b1.*dmoe-export build"):
        setup.open()


def test_no_engine_no_library_no_driver(monkeypatch, engines, golden_bundle):
    with pytest.raises(MissingRequirementError, match="holds no engine; build one with: dmoe-export build"):
        open_tensorrt(golden_bundle)
    setup = Setup(monkeypatch, engines)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingRequirementError, match=r"TensorRT cannot be imported .*pip install 'tensorrt>="):
        setup.open()


def test_the_engine_that_came_farthest_is_named(monkeypatch, engines):
    entry = engines.manifest.engines[0]
    entries = [entry.model_copy(update={"targets": ["sm75"]}), entry.model_copy(update={"version": "9.9"}),
               entry.model_copy(update={"targets": ["sm80"]})]
    bundle = Bundle(engines.folder, engines.manifest.model_copy(update={"engines": entries}))
    with pytest.raises(MissingRequirementError, match=r"was built with TensorRT 9\.9"):
        Setup(monkeypatch, bundle).open()
    bundle = Bundle(engines.folder, engines.manifest.model_copy(update={"engines": [*entries, entry]}))
    assert Setup(monkeypatch, bundle).open().name == "tensorrt"


def test_weights_that_are_not_there(monkeypatch, engines):
    first, *rest = engines.manifest.engines[0].weight_inputs
    for updates, kind, sentence in (
            ({"offset": first.offset + 10**9}, BundleError, "weights reach to byte .* has .* bytes"),
            ({"file": "other.bin"}, BundleError, "is not listed in the manifest"),
            ({"bytes": first.bytes - 4}, BundleError, f"Weight {first.name} .* its shape"),
            ({"name": "unknown"}, BundleError, f"has a tensor {first.name} .* none of this name")):
        with pytest.raises(kind, match=sentence):
            Setup(monkeypatch, changed(engines, weight_inputs=[first.model_copy(update=updates), *rest])).open()
    extra = first.model_copy(update={"name": "extra"})
    with pytest.raises(BundleError, match="lacks the tensor extra"):
        Setup(monkeypatch, changed(engines, weight_inputs=[first, *rest, extra])).open()
    with pytest.raises(DeviceMemoryError, match=r"needs 0.0. GB for weights and scratch memory, Host Memory has 0.00"):
        Setup(monkeypatch, engines, memory=100_000).open()


def test_outputs_that_are_missing(monkeypatch, engines):
    content = json.loads((engines.folder / "a.engine").read_text())
    for without, fits in (("logits", True), ("expert_ids", False)):
        (engines.folder / "b.engine").write_text(json.dumps({**content, "without": [without]}))
        setup = Setup(monkeypatch, changed(engines, file="b.engine"))
        if fits:
            setup.open()
        else:
            with pytest.raises(BundleError, match="lacks the tensor expert_ids"):
                setup.open()
