"""The TensorRT backend, for both flavours: an engine file, execution contexts, external weights on the device.

Nothing here has run on a GPU yet: tests run it on a stand-in for TensorRT that executes ONNX Runtime on the addresses.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ...bundle.engine_entries import EngineEntry, WeightInput
from ...bundle.graph_entries import GraphEntry
from ...bundle.reader import Bundle
from ...description import Precision
from ...errors import BundleError, MissingRequirementError
from ..backend import Limits
from ..expert_layout import fragments_of
from .backend import DeviceBackend
from .call import Call, Sizes
from .candidates import installed
from .device import CudaDevice, Device, DeviceError, DeviceMemoryError
from .expert_pools import DeviceExperts
from .memory import Buffer, Piece, Pool, upload
from .profiles import fitted, limits_of, profile_of
from .tensorrt_engine import deserialise, engine_beside, find_engine, last_error, weight_path

_DTYPES = {"input_ids": "INT64", "position_ids": "INT64", "past_positions": "INT64", "logit_rows": "INT64",
           "logits_kept": "INT64", "attention_positions": "INT64",
           "top_p": "FLOAT", "min_experts": "INT64", "coreset_size": "INT64", "token_ids": "INT64",
           "confidence": "FLOAT", "logits": "FLOAT", "expert_ids": "INT32",
           "denoise": "BOOL", "soft_embeddings": "FLOAT", "temperature": "FLOAT", "uniform": "FLOAT",
           "sampled_ids": "INT64", "entropy": "FLOAT", "next_soft_embeddings": "FLOAT",
           "unmasked": "BOOL", "threshold": "FLOAT", "salient": "BOOL"}
_PRECISIONS = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16"}
_NEEDED = {"token_ids", "confidence", "expert_ids", "salient", "sampled_ids", "entropy", "next_soft_embeddings"}


@dataclass
class _Context:
    """An execution context and what is bound to it."""

    raw: Any
    profile: int
    bound: dict[str, tuple[int, tuple[int, ...]]] = field(default_factory=dict)


class TensorRTExecutor:
    """Runs calls on an engine. One context serves each profile; recorded calls get contexts of their own.

    All contexts share one scratch memory, as they take turns on one stream.
    """

    era = 0  # an isolated context keeps what it was recorded with
    experts: DeviceExperts | None
    _scratch: Buffer
    _weights: dict[str, tuple[Buffer, tuple[int, ...]]]

    def __init__(self, bundle: Bundle, entry: EngineEntry, trt: Any, pool: Pool, stream: int,
                 slots: int | None = None, lock: threading.RLock | None = None,
                 beside: TensorRTExecutor | None = None) -> None:
        """Deserialises the engine and uploads its external weights; raises as `deserialise` and `Pool` do.

        `slots`: experts per layer on the device, of an engine with expert pools; None = all. `lock` guards `stream`.
        `beside`: the bundle's other engine that is open (`engine_beside`), whose weights and experts this one reads,
        and whose scratch memory it uses where that is large enough: they take turns on one stream.
        """
        self._trt, self._entry, self._stream = trt, entry, stream
        self._engine = engine = deserialise(bundle, entry, trt)
        self.precision: Precision = entry.precision
        self.limits: Limits | None = limits_of(entry)
        self._inputs, self._outputs = self._names(bundle)
        self._host_inputs = {name for name in self._inputs
                             if engine.get_tensor_location(name) == trt.TensorLocation.HOST}
        profiles = range(len(entry.profiles))
        scratch = max(int(engine.get_device_memory_size_for_profile_v2(index)) for index in profiles)
        if beside is None:
            self._load(bundle, pool, scratch, slots, lock or threading.RLock())
        else:
            self._scratch, self._weights, self.experts = beside._scratch, beside._weights, beside.experts
            if self._scratch.size < scratch:
                self._check_room(pool.device, scratch)
                self._scratch = pool.allocate(scratch)
        self._runtime_cache: Any = None
        self._contexts: dict[int, _Context] = {}

    def _load(self, bundle: Bundle, pool: Pool, scratch: int, slots: int | None, lock: threading.RLock) -> None:
        """Bring to the device what is not in the engine."""
        entry, moe = self._entry, bundle.manifest.model.moe
        pooled = {name for layer in entry.expert_pools for name, _ in layer.pairs}
        plain = [weight for weight in entry.weight_inputs if weight.name not in pooled]
        slots = slots or (moe.num_experts if moe else 0)
        self._check_room(pool.device, scratch + sum(weight.bytes for weight in plain)
                         + DeviceExperts.device_bytes(entry, slots))
        self._scratch = pool.allocate(scratch)
        self._weights = self._upload(bundle, pool, plain)
        self.experts = DeviceExperts(bundle, entry, pool, self._stream, slots, lock) if pooled else None

    def fit(self, least: Sizes, rows_step: int) -> Sizes:
        """See `Executor`."""
        return fitted(self._entry, least, rows_step)

    def execute(self, call: Call, stream: int) -> None:
        """See `Executor`."""
        profile = profile_of(self._entry, call.sizes)
        if profile not in self._contexts:
            self._contexts[profile] = self._new_context(profile, alone=False)
        self._bind(self._contexts[profile], call)
        self._enqueue(self._contexts[profile], stream)

    def isolate(self, call: Call, stream: int) -> _Isolated | None:
        """See `Executor`: a context of its own, as a graph keeps what it was recorded with."""
        if self._host_inputs or self._entry.experts_op == "onnx":
            return None  # the host reads inputs, or counts the rounds of a loop, at every step: a graph cannot
        context = self._new_context(profile_of(self._entry, call.sizes), alone=True)
        self._bind(context, call)
        return _Isolated(self, context)

    def close(self) -> None:
        """See `Executor`."""
        self.experts = None
        del self._contexts, self._engine, self._scratch, self._weights

    def _new_context(self, profile: int, alone: bool) -> _Context:
        trt, engine = self._trt, self._engine
        managed = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._entry.flavour == "tensorrt-rtx":
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(managed)
            # A recorded call would keep the slow kernels that RTX uses until those for its shapes are compiled.
            strategies = trt.DynamicShapesKernelSpecializationStrategy
            config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER if alone else strategies.LAZY
            if self._runtime_cache is None:
                self._runtime_cache = config.create_runtime_cache()
            config.set_runtime_cache(self._runtime_cache)  # kernels are compiled once for all contexts
            raw = engine.create_execution_context(config)
        else:
            raw = engine.create_execution_context(managed)
        if raw is None:
            raise DeviceError(f"No execution context for {self._entry.file}: {last_error(trt)}.")
        context = _Context(raw, profile)
        self._must(raw.set_optimization_profile_async(profile, self._stream), "select a profile")
        raw.set_device_memory(self._scratch.address, self._scratch.size)
        fixed = {name: (buffer.address, shape) for name, (buffer, shape) in self._weights.items()}
        for name, (address, shape) in (fixed | (self.experts.bindings if self.experts else {})).items():
            self._set(context, name, address, shape, is_input=True)
        return context

    def _bind(self, context: _Context, call: Call) -> None:
        for name in self._inputs:
            tensor = call.inputs[name]
            address = tensor.host if name in self._host_inputs else tensor.address
            assert address is not None  # only what the host stages is ever read by the host
            self._set(context, name, address, tensor.shape, is_input=True)
        for name in self._outputs:
            tensor = call.outputs[name]
            self._set(context, name, tensor.address, tensor.shape, is_input=False)

    def _set(self, context: _Context, name: str, address: int, shape: tuple[int, ...], is_input: bool) -> None:
        before = context.bound.get(name)
        if before == (address, shape):
            return
        if is_input and (before is None or before[1] != shape):
            self._must(context.raw.set_input_shape(name, shape), f"take {name} of shape {list(shape)}")
        self._must(context.raw.set_tensor_address(name, address), f"take an address for {name}")
        context.bound[name] = (address, shape)

    def _enqueue(self, context: _Context, stream: int) -> None:
        self._must(context.raw.execute_async_v3(stream), "run")

    def _must(self, done: bool, what: str) -> None:
        if not done:
            raise DeviceError(f"Engine {self._entry.file} did not {what}: {last_error(self._trt)}.")

    def _names(self, bundle: Bundle) -> tuple[list[str], list[str]]:
        """Inputs (without weights) and outputs; raises BundleError when they are not those of the bundle's graph."""
        trt, engine = self._trt, self._engine
        weights = {weight.name for weight in self._entry.weight_inputs}
        weights |= {tensor.name for tensor in self._entry.pool_inputs}
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        outputs = [name for name in names if name not in inputs]
        graph = bundle.manifest.graph_of(self._entry)
        for name in names:
            if name in weights:
                continue
            known = name in {entry.name for entry in (*graph.inputs, *graph.outputs)}
            want = _DTYPES.get(name, _PRECISIONS[self.precision])
            if not known or engine.get_tensor_dtype(name) != getattr(trt.DataType, want):
                raise BundleError(f"Engine {self._entry.file} has a tensor {name} of type "
                                  f"{engine.get_tensor_dtype(name).name}, the bundle's graph has "
                                  f"{f'{want} there' if known else 'none of this name'}; build the engine again with: "
                                  f"dmoe-export build {bundle.folder}.")
        missing = (weights - set(inputs)) | ((_NEEDED & {entry.name for entry in graph.outputs}) - set(outputs))
        if missing:
            raise BundleError(f"Engine {self._entry.file} lacks the tensor {sorted(missing)[0]}; build it again with: "
                              f"dmoe-export build {bundle.folder}.")
        return [name for name in inputs if name not in weights], outputs

    def _check_room(self, device: Device, needed: int) -> None:
        free, total = device.memory()
        if needed > free:
            raise DeviceMemoryError(
                f"Engine {self._entry.file} needs {needed / 1e9:.2f} GB for weights and scratch memory, {device.name} "
                f"has {free / 1e9:.2f} of {total / 1e9:.1f} GB free; end other programs on it, use a larger GPU, or "
                "build with --experts resident and give an expert budget.")

    def _upload(self, bundle: Bundle, pool: Pool,
                weights: list[WeightInput]) -> dict[str, tuple[Buffer, tuple[int, ...]]]:
        placed, pieces, orders = {}, [], fragments_of(bundle.manifest)
        for weight in weights:
            itemsize = self._engine.get_tensor_dtype(weight.name).itemsize
            if math.prod(weight.shape) * itemsize != weight.bytes:
                raise BundleError(f"Weight {weight.name} of engine {self._entry.file} has {weight.bytes} bytes in the "
                                  f"manifest, its shape {weight.shape} needs {math.prod(weight.shape) * itemsize}; "
                                  f"build the engine again with: dmoe-export build {bundle.folder}.")
            path = weight_path(bundle, weight.file, weight.offset, weight.bytes)
            placed[weight.name] = pool.allocate(weight.bytes), tuple(weight.shape)
            pieces.append(Piece(placed[weight.name][0].address, path, weight.offset, weight.bytes,
                                orders.get(weight.name)))
        upload(pool.device, self._stream, pieces)
        return placed


class _Isolated:
    """A call with a context of its own (see `Launcher`)."""

    host_reads = True  # the context's own

    def __init__(self, executor: TensorRTExecutor, context: _Context) -> None:
        self._executor, self._context = executor, context

    def __call__(self, stream: int) -> None:
        self._executor._enqueue(self._context, stream)

    def capturable(self, stream: int) -> bool:
        ask = getattr(self._context.raw, "is_stream_capturable", None)  # not every version knows the question
        return True if ask is None else bool(ask(stream))


def open_tensorrt(bundle: Bundle, device: Device | None = None, cuda_graphs: bool = True) -> DeviceBackend:
    """The backend of the bundle's engine that fits this machine's GPU and TensorRT.

    Raises MissingRequirementError (no driver, GPU, library or fitting engine; exit code 3) or BundleError (the engine
    is damaged or not this bundle's; exit code 2).
    """
    if not bundle.manifest.denoiser_engines:  # the first thing to do, whatever else is missing
        raise MissingRequirementError(f"{bundle.folder} holds no engine; build one with: "
                                      f"dmoe-export build {bundle.folder}.")
    return _open(bundle, device, cuda_graphs, None)[0]


def open_tensorrt_resident(bundle: Bundle, slots: int, device: Device | None = None,
                           cuda_graphs: bool = True) -> tuple[DeviceBackend, DeviceExperts]:
    """The backend of an engine with expert pools, `slots` experts per layer on the device, and the tier that moves.

    Raises as `open_tensorrt`.
    """
    backend, executor = _open(bundle, device, cuda_graphs, slots)
    assert executor.experts  # such an engine was asked for
    return backend, executor.experts


def _open(bundle: Bundle, device: Device | None, cuda_graphs: bool,
          slots: int | None) -> tuple[DeviceBackend, TensorRTExecutor]:
    device = device or CudaDevice.open()
    entry, trt = find_engine(bundle, device, resident=slots is not None)
    pool, stream, lock = Pool(device), device.stream(), threading.RLock()
    executor = TensorRTExecutor(bundle, entry, trt, pool, stream, slots, lock)

    def find_graph(graph: GraphEntry) -> Callable[[], TensorRTExecutor]:
        other = engine_beside(bundle, entry, graph, trt)
        return lambda: TensorRTExecutor(bundle, other, trt, pool, stream, beside=executor)

    backend = DeviceBackend("tensorrt", bundle, device, pool, stream, executor, find_graph, cuda_graphs, lock,
                            installed())
    return backend, executor
