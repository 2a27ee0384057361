"""A bundle with an engine for the stand-in of TensorRT, and a machine to open it on."""

from __future__ import annotations

import json
import shutil
import sys
from types import SimpleNamespace

from fake_cudart import HostDevice
from fake_tensorrt import FakeTensorRT, weights_as_inputs

from dmoe_export.bundle.manifest import EngineEntry, ProfileEntry, WeightInput
from dmoe_export.bundle.reader import Bundle
from dmoe_export.runtime.tensorrt import open_tensorrt

PROFILES = [ProfileEntry(name="prefill", batch=(1, 1, 4), tokens=(32, 96, 96), past=(1, 128, 600), rows=(1, 1, 32)),
            ProfileEntry(name="denoise", batch=(1, 1, 4), tokens=(32, 32, 32), past=(1, 256, 620), rows=(1, 32, 32))]


def bundle_with_engine(golden_bundle, folder):
    """A copy of the golden bundle with an engine whose experts are external."""
    shutil.copytree(golden_bundle.folder, folder)
    found = weights_as_inputs(folder / "denoiser.onnx", folder / "external.onnx", "experts.bin")
    assert len(found) == 2 * len(golden_bundle.manifest.model.moe_layers)
    (folder / "a.engine").write_text(json.dumps({
        "onnx": str(folder / "external.onnx"), "plugins": True, "profiles": [p.model_dump() for p in PROFILES]}))
    weights = [WeightInput(name=name, file="experts.bin", offset=offset, bytes=size, dtype="float32", shape=shape)
               for name, offset, size, shape in found]
    entry = EngineEntry(file="a.engine", flavour="tensorrt", version="11.4.0.0", targets=["sm86", "sm89"],
                        precision="fp32", experts="external", experts_op="plugin", profiles=PROFILES,
                        plugin_build="b1", plugin_nodes=4, fallback_nodes=0, weight_inputs=weights)
    return Bundle(folder, golden_bundle.manifest.model_copy(update={"engines": [entry]}))


def changed(bundle, **updates):
    """The bundle with another engine entry."""
    entry = bundle.manifest.engines[0].model_copy(update=updates)
    return Bundle(bundle.folder, bundle.manifest.model_copy(update={"engines": [entry]}))


class Setup:
    """A device, the module on it, and the backend."""

    def __init__(self, monkeypatch, bundle, graphs=True, rtx=False, **options):
        self.device = HostDevice(**options)
        self.trt = FakeTensorRT(self.device.fake, rtx=rtx)
        if rtx:
            bundle = changed(bundle, flavour="tensorrt-rtx")
            # The PyPI wheel: no module tensorrt_rtx, and the bindings one level down.
            wheel = SimpleNamespace(tensorrt_rtx_bindings=self.trt)
            monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
            monkeypatch.setitem(sys.modules, "tensorrt_rtx_bindings", wheel)
        else:
            monkeypatch.setitem(sys.modules, "tensorrt", self.trt)
        self.bundle, self.graphs = bundle, graphs

    def open(self):
        return open_tensorrt(self.bundle, self.device, self.graphs)
