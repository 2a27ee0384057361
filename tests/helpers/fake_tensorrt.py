"""A stand-in for the module tensorrt: its engines run ONNX Runtime on the bound addresses, in stream order.

An engine file is JSON that names an ONNX file, and which inputs are in fragment order. The rules of the real thing are
kept: shapes lie in the profile, addresses are aligned, all is bound before a run, scratch memory is there and is
written over, a first run after a change of shapes cannot be recorded. Names and signatures are compared with the
installed TensorRT-RTX by a test.
"""

from __future__ import annotations

import enum
import json
import math

import numpy as np
import onnx
import onnxruntime as ort
from fragment_helpers import in_rows

from dmoe_export.ops.plugin_library import NAMES

SCRATCH = (70_000, 3_000)  # of the profiles


class TensorIOMode(enum.Enum):
    NONE = 0
    INPUT = 1
    OUTPUT = 2


class TensorLocation(enum.Enum):
    DEVICE = 0
    HOST = 1


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC = 0
    ON_PROFILE_CHANGE = 1
    USER_MANAGED = 2


class DynamicShapesKernelSpecializationStrategy(enum.Enum):
    LAZY = 0
    EAGER = 1
    NONE = 2


class EngineInvalidityDiagnostics(enum.IntEnum):
    VERSION_MISMATCH = 1
    UNSUPPORTED_CC = 2
    MALFORMED_ENGINE = 32


class DataType(enum.Enum):
    FLOAT = "tensor(float)"
    HALF = "tensor(float16)"
    INT32 = "tensor(int32)"
    INT64 = "tensor(int64)"
    UINT8 = "tensor(uint8)"
    BOOL = "tensor(bool)"

    @property
    def itemsize(self):
        return np.dtype(self.numpy).itemsize

    @property
    def numpy(self):
        return {"FLOAT": np.float32, "HALF": np.float16, "INT32": np.int32, "INT64": np.int64,
                "UINT8": np.uint8, "BOOL": np.bool_}[self.name]


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING = range(3)

    def log(self, severity, msg):
        raise NotImplementedError


class IPluginRegistry:
    """Of a process; `libraries` are those that were loaded into it, `known` whether somebody registered our plugins."""

    def __init__(self):
        self.libraries, self.known, self.refuses = [], False, False

    def get_creator(self, type, version, plugin_namespace):
        ours = type in NAMES and (version, plugin_namespace) == ("1", "dmoe")
        return object() if ours and self.known else None

    def load_library(self, plugin_path):
        assert not self.known, "the real one fails where a plugin is registered already"
        self.libraries.append(plugin_path)
        self.known = not self.refuses
        return object() if self.known else None


class FakeTensorRT:
    """The module. `cudart`: the FakeCudart whose addresses and streams it uses."""

    def __init__(self, cudart, version="11.4.0.0", rtx=False):
        self.cudart, self.__version__, self.rtx = cudart, version, rtx
        self.embedded_loads, self.host_inputs, self.capturable, self.trouble = True, (), True, ""
        self.contexts = []
        self.registry = IPluginRegistry()
        self.registry.known = not rtx  # where engines carry no library, most tests are not about loading one
        self.get_plugin_registry = lambda: self.registry
        for kind in (TensorIOMode, TensorLocation, ExecutionContextAllocationStrategy, DataType, ILogger,
                     DynamicShapesKernelSpecializationStrategy, EngineInvalidityDiagnostics):
            setattr(self, kind.__name__, kind)
        self.Runtime = lambda logger: Runtime(self, logger)


class Runtime:
    def __init__(self, trt, logger):
        self._trt, self._logger = trt, logger
        self.engine_host_code_allowed = False
        if trt.rtx:
            self.get_engine_validity = lambda buffer: (None, EngineInvalidityDiagnostics.MALFORMED_ENGINE)

    def deserialize_cuda_engine(self, serialized_engine):
        try:
            content = json.loads(bytes(serialized_engine))
        except ValueError:
            self._logger.log(ILogger.WARNING, "not this")
            self._logger.log(ILogger.ERROR, "Serialization assertion failed.\n")
            return None
        carried = self._trt.rtx or content["version_compatible"]
        loaded = carried and self._trt.embedded_loads and self.engine_host_code_allowed
        if content["plugins"] and not (loaded or self._trt.registry.known):
            self._logger.log(ILogger.ERROR, "Cannot find plugin: DmoeExperts, version: 1, namespace: dmoe.")
            self._logger.log(ILogger.ERROR, "IRuntime::deserializeCudaEngine failed.")
            return None
        if self._trt.trouble:
            self._logger.log(ILogger.ERROR, self._trt.trouble)
            return None
        return ICudaEngine(self._trt, self._logger, content)


class IRuntimeConfig:
    dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY

    def set_execution_context_allocation_strategy(self, strategy):
        self._strategy = strategy

    def create_runtime_cache(self):
        return object()

    def set_runtime_cache(self, cache):
        self._cache = cache
        return True


class ICudaEngine:
    def __init__(self, trt, logger, content):
        self._trt, self._logger, self._profiles = trt, logger, content["profiles"]
        self.pools, self.arranged = content.get("pools", []), content.get("arranged", {})
        self._session = ort.InferenceSession(content["onnx"], providers=["CPUExecutionProvider"])
        self._tensors = {e.name: (TensorIOMode.INPUT, e) for e in self._session.get_inputs()}
        self._tensors |= {e.name: (TensorIOMode.OUTPUT, e) for e in self._session.get_outputs()}
        for name in content.get("without", ()):
            del self._tensors[name]
        self.num_io_tensors = len(self._tensors)
        self.num_optimization_profiles = len(self._profiles)
        if trt.rtx:
            self.create_runtime_config = IRuntimeConfig

    def get_tensor_name(self, index):
        return list(self._tensors)[index]

    def get_tensor_mode(self, name):
        return self._tensors[name][0]

    def get_tensor_dtype(self, name):
        return DataType(self._tensors[name][1].type)

    def get_tensor_shape(self, name):
        return tuple(dim if isinstance(dim, int) else -1 for dim in self._tensors[name][1].shape)

    def get_tensor_profile_shape(self, name, profile_index):
        profile = self._profiles[profile_index]
        sizes = {"B": profile["batch"], "T": profile["tokens"], "S": profile["past"], "M": profile["rows"],
                 "L": (1, 1, profile["rows"][2])}
        return [tuple(dim if isinstance(dim, int) else sizes[dim][which] for dim in self._tensors[name][1].shape)
                for which in range(3)]

    def get_tensor_location(self, name):
        return TensorLocation.HOST if name in self._trt.host_inputs else TensorLocation.DEVICE

    def get_device_memory_size_for_profile_v2(self, profile_index):
        return SCRATCH[profile_index]

    def create_execution_context(self, strategy):
        if self._trt.rtx:
            assert strategy._cache is not None
            strategy, kernels = strategy._strategy, strategy.dynamic_shapes_kernel_specialization_strategy
        else:
            kernels = None
        assert strategy == ExecutionContextAllocationStrategy.USER_MANAGED
        self._trt.contexts.append(IExecutionContext(self, kernels))
        return self._trt.contexts[-1]


class IExecutionContext:
    def __init__(self, engine, kernels):
        self._engine, self._trt, self.kernels = engine, engine._trt, kernels
        self.profile = self._scratch = None
        self._shapes, self._addresses = {}, {}
        self._settled = False
        self.runs = 0
        if self._trt.rtx:
            self.is_stream_capturable = lambda stream: self._trt.capturable

    def _fail(self, message):
        self._engine._logger.log(ILogger.ERROR, message)
        return False

    def set_optimization_profile_async(self, profile_index, stream_handle):
        self.profile = profile_index
        return True

    def set_device_memory(self, memory, size):
        assert memory % 256 == 0
        self._scratch = (memory, size)

    def set_input_shape(self, name, shape):
        mode, entry = self._engine._tensors[name]
        assert mode is TensorIOMode.INPUT and isinstance(shape, tuple)
        sizes = {"B": "batch", "T": "tokens", "S": "past", "M": "rows", "L": "kept"}
        for dim, got in zip(entry.shape, shape, strict=True):
            if dim == "P":
                continue
            profile = self._engine._profiles[self.profile]
            kept = {"kept": (1, 1, profile["rows"][2])}
            low, _, high = (profile | kept)[sizes[dim]] if dim in sizes else (dim, dim, dim)
            if not low <= got <= high:
                return self._fail(f"{name}: {got} is not in {low} … {high}.")
        if self._shapes.get(name) != shape:
            self._shapes[name], self._settled = shape, False
        return True

    def set_tensor_address(self, name, memory):
        assert memory % 256 == 0 and name in self._engine._tensors
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle):
        cudart = self._trt.cudart
        if cudart.recording(stream_handle) and not self._settled:
            return self._fail("deferred updates cannot be recorded.")
        tensors = self._engine._tensors
        missing = set(tensors) - set(self._addresses)
        if missing or self._scratch is None or self._scratch[1] < SCRATCH[self.profile]:
            return self._fail(f"not bound: {sorted(missing)}.")
        self._settled, self.runs = True, self.runs + 1
        shapes, addresses, scratch = dict(self._shapes), dict(self._addresses), self._scratch
        host = {name: self._array(name, shapes[name], addresses[name]).copy() for name in self._trt.host_inputs}

        def work():
            feeds = {name: host[name] if name in host else self._array(name, shape, addresses[name])
                     for name, shape in shapes.items()}
            check_slots(self._engine.pools, feeds)
            # The bodies read rows, as the file has them.
            feeds |= {name: in_rows(feeds[name], bits) for name, bits in self._engine.arranged.items()}
            outputs = [name for name, (mode, _) in tensors.items() if mode is TensorIOMode.OUTPUT]
            for name, result in zip(outputs, self._engine._session.run(outputs, feeds), strict=True):
                np.copyto(self._array(name, result.shape, addresses[name]), result)
            cudart.view(scratch[0], SCRATCH[self.profile])[:] = 0xEE

        cudart.enqueue(stream_handle, work)
        return True

    def _array(self, name, shape, address):
        dtype = np.dtype(self._engine.get_tensor_dtype(name).numpy)
        return self._trt.cudart.view(address, math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)


def check_slots(pools, feeds):
    """What the table says is in a slot must be there, whole, at the time the forward runs."""
    for pool in pools:
        slots = feeds[pool["slot_of_expert"]]
        resident = np.flatnonzero(slots >= 0)
        assert len(set(slots[resident])) == len(resident), f"two experts in a slot of {pool['gate_up_pool']}: {slots}"
        for tensor in (name for name in ("gate_up", "down", "gate_up_scales", "down_scales") if pool[name]):
            have, want = feeds[pool[f"{tensor}_pool"]], feeds[pool[tensor]]
            for expert in resident:
                right = have[slots[expert]].tobytes() == want[expert].tobytes()
                assert right, f"slot {slots[expert]} of {pool[f'{tensor}_pool']} does not hold expert {expert}"


def weights_as_inputs(source, target, of_file):
    """A copy of a graph whose initializers in `of_file` are inputs; their (name, offset, bytes, dtype, shape)."""
    model = onnx.load(source, load_external_data=False)
    found = []
    for tensor in list(model.graph.initializer):
        where = {entry.key: entry.value for entry in tensor.external_data}
        if where.get("location") == of_file:
            found.append((tensor.name, int(where["offset"]), int(where["length"]),
                          str(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)), list(tensor.dims)))
            model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
            model.graph.initializer.remove(tensor)
    onnx.save(model, target)
    return found
