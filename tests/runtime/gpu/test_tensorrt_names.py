"""Names that runtime and stand-in use exist in the installed TensorRT-RTX, as far as it goes without a GPU."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import fake_tensorrt
import pytest
from fake_cudart import HostDevice
from tensorrt_helpers import bundle_with_engine, changed

from dmoe_export.errors import BundleError
from dmoe_export.ops import plugin_library
from dmoe_export.runtime.gpu import tensorrt as tensorrt_module
from dmoe_export.runtime.gpu import tensorrt_engine
from dmoe_export.runtime.gpu.tensorrt import open_tensorrt

CLASSES = {"engine": "ICudaEngine", "raw": "IExecutionContext", "runtime": "Runtime", "config": "IRuntimeConfig",
           "registry": "IPluginRegistry"}


def test_every_name_exists_in_tensorrt_rtx():
    trt = pytest.importorskip("tensorrt_rtx_bindings")
    trt = getattr(trt, "tensorrt_rtx_bindings", trt)
    source = "".join(Path(m.__file__).read_text() for m in (tensorrt_module, tensorrt_engine, plugin_library))
    used = set()
    for variable, kind in CLASSES.items():
        for name in re.findall(rf"\b{variable}\.(\w+)", source):
            assert hasattr(getattr(trt, kind), name), f"{kind}.{name}"
            used.add(name)
    for first, second in re.findall(r"\btrt\.([A-Z]\w+)(?:\.([A-Z_]+)\b)?", source):
        assert hasattr(getattr(trt, first), second or "__doc__"), f"{first}.{second}"
        used.add(first)
    assert {"set_tensor_address", "execute_async_v3", "deserialize_cuda_engine", "create_runtime_config", "ILogger",
            "set_device_memory", "get_tensor_location", "get_creator"} <= used
    assert {"get_plugin_registry", "load_library"} <= {*dir(trt), *dir(trt.IPluginRegistry)}
    assert hasattr(trt.IExecutionContext, "is_stream_capturable") and trt.DataType.BF16.itemsize == 2
    assert {"EAGER", "LAZY"} <= set(trt.DynamicShapesKernelSpecializationStrategy.__members__)
    for name in tensorrt_module._PRECISIONS.values():
        assert name in trt.DataType.__members__


def test_stand_in_has_the_real_names_and_arguments():
    trt = pytest.importorskip("tensorrt_rtx_bindings")
    trt = getattr(trt, "tensorrt_rtx_bindings", trt)
    for kind in ("Runtime", "ICudaEngine", "IExecutionContext", "IRuntimeConfig", "ILogger", "IPluginRegistry"):
        for name, function in inspect.getmembers(getattr(fake_tensorrt, kind), inspect.isfunction):
            if name.startswith("_"):
                continue
            signatures = re.findall(rf"{name}\(self: [^,)]*(.*?)\) ->", getattr(getattr(trt, kind), name).__doc__)
            assert len(inspect.signature(function).parameters) - 1 in {
                len(re.findall(r", \w+: ", signature)) for signature in signatures}, name
    for kind in ("TensorIOMode", "TensorLocation", "ExecutionContextAllocationStrategy", "DataType",
                 "DynamicShapesKernelSpecializationStrategy", "EngineInvalidityDiagnostics"):
        assert set(getattr(fake_tensorrt, kind).__members__) <= set(getattr(trt, kind).__members__)


def test_the_real_library_refuses_garbage_in_one_sentence(golden_bundle, tmp_path):
    """As far as TensorRT-RTX goes without a GPU: our logger, its Runtime, its answer to a broken file."""
    trt = pytest.importorskip("tensorrt_rtx_bindings")
    trt = getattr(trt, "tensorrt_rtx_bindings", trt)
    bundle = changed(bundle_with_engine(golden_bundle, tmp_path / "b"), flavour="tensorrt-rtx", version=trt.__version__)
    with pytest.raises(BundleError, match=r"a.engine of .* bytes cannot be opened by TensorRT-RTX 1\.\d.*malformed"):
        open_tensorrt(bundle, HostDevice())
