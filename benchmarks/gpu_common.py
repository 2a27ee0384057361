"""What GPU tests and benchmarks share: is there a GPU, the kernels' C interface, timing with events, result files."""

from __future__ import annotations

import ctypes
import json
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from dmoe_export.runtime.gpu.device import Device

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "dmoe_export" / "lib" / "libdmoe_plugins.so"
RESULTS = ROOT / "benchmarks" / "results"
MODES = {"token": 0, "top_p": 1, "top_c": 2}
TYPES = {"fp16": 0, "bf16": 1}
NO_GPU = 3  # exit code: a requirement is missing


class RouteAttributesC(ctypes.Structure):
    """DmoeRouteAttributes."""

    _fields_ = [(name, ctypes.c_int32) for name in (
        "mode", "block_length", "experts_per_token", "num_groups", "groups_kept", "softmax", "renormalise",
    )] + [("routed_scaling", ctypes.c_float)]


class ExpertsShapeC(ctypes.Structure):
    """DmoeExpertsShape."""

    _fields_ = [(name, ctypes.c_int32) for name in ("tokens", "places", "experts", "hidden", "width", "type",
                                                           "activation")]


class ExpertPoolC(ctypes.Structure):
    """DmoeExpertPool."""

    _fields_ = [("slots", ctypes.c_int32)] + [(name, ctypes.c_void_p) for name in ("slot_of_expert", "gate_up", "down")]


class QuantisationC(ctypes.Structure):
    """DmoeQuantisation."""

    _fields_ = [(name, ctypes.c_int32) for name in ("bits", "group_size")] + [
        (name, ctypes.c_void_p) for name in ("gate_up_scales", "down_scales", "gate_up_pool_scales",
                                             "down_pool_scales")]


class KernelError(Exception):
    """A kernel call was refused, or its launch failed."""


class KernelLibrary:
    """dmoe_kernels.h on addresses: of device memory with the CUDA library, of host memory with the emulated one."""

    def __init__(self, path: Path) -> None:
        """Raises OSError when it cannot be loaded."""
        self.path, self._library = path, ctypes.CDLL(str(path))
        for name in ("dmoe_error_string", "dmoe_build_id"):
            getattr(self._library, name).restype = ctypes.c_char_p
        for name in ("dmoe_experts_workspace_bytes", "dmoe_head_workspace_bytes",
                     "dmoe_self_attention_workspace_bytes", "dmoe_router_workspace_bytes",
                     "dmoe_mixture_workspace_bytes"):
            getattr(self._library, name).restype = ctypes.c_int64

    @property
    def build(self) -> str:
        """Hash of the sources it was built from."""
        return self._library.dmoe_build_id().decode()

    def route(self, attributes: RouteAttributesC, rows: int, tokens: int, experts: int, addresses: Sequence[int | None],
              stream: int) -> None:
        """`dmoe_block_route`; addresses in the header's order, six inputs and three outputs."""
        self._call("dmoe_block_route", ctypes.byref(attributes), rows, tokens, experts, *_pointers(addresses, 9),
                   ctypes.c_void_p(stream))

    def workspace_bytes(self, shape: ExpertsShapeC) -> int:
        """`dmoe_experts_workspace_bytes`."""
        size = self._library.dmoe_experts_workspace_bytes(ctypes.byref(shape))
        self._check(min(size, 0))
        return size

    def experts(self, shape: ExpertsShapeC, addresses: Sequence[int | None], stream: int) -> None:
        """`dmoe_experts`; hidden, ids, weights, gate_up, down, mixed, workspace."""
        self._call("dmoe_experts", ctypes.byref(shape), *_pointers(addresses, 7), ctypes.c_void_p(stream))

    def experts_resident(self, shape: ExpertsShapeC, pool: ExpertPoolC, addresses: Sequence[int | None],
                         stream: int) -> None:
        """`dmoe_experts_resident`; addresses as in `experts`."""
        self._call("dmoe_experts_resident", ctypes.byref(shape), ctypes.byref(pool), *_pointers(addresses, 7),
                   ctypes.c_void_p(stream))

    def experts_quantised(self, shape: ExpertsShapeC, quantisation: QuantisationC, addresses: Sequence[int | None],
                          stream: int, pool: ExpertPoolC | None = None) -> None:
        """`dmoe_experts_quantised`; addresses as in `experts`."""
        self._call("dmoe_experts_quantised", ctypes.byref(shape), ctypes.byref(quantisation),
                   pool and ctypes.byref(pool), *_pointers(addresses, 7), ctypes.c_void_p(stream))

    def head_workspace_bytes(self, shape: ctypes.Structure) -> int:
        """`dmoe_head_workspace_bytes`; a DmoeHeadShape."""
        size = self._library.dmoe_head_workspace_bytes(ctypes.byref(shape))
        self._check(min(size, 0))
        return int(size)

    def head(self, shape: ctypes.Structure, attributes: ctypes.Structure, addresses: Sequence[int | None],
             stream: int) -> None:
        """`dmoe_head`; hidden, norm, weight, logit_rows, token_ids, confidence, logits, workspace."""
        self._call("dmoe_head", ctypes.byref(shape), ctypes.byref(attributes), *_pointers(addresses, 8),
                   ctypes.c_void_p(stream))

    def self_attention_workspace_bytes(self, shape: ctypes.Structure) -> int:
        """`dmoe_self_attention_workspace_bytes`."""
        size = self._library.dmoe_self_attention_workspace_bytes(ctypes.byref(shape))
        self._check(min(size, 0))
        return size

    def self_attention(self, shape: ctypes.Structure, addresses: Sequence[int | None], stream: int) -> None:
        """`dmoe_self_attention`; addresses in the header's order, nine inputs, three outputs and the workspace."""
        self._call("dmoe_self_attention", ctypes.byref(shape), *_pointers(addresses, 13), ctypes.c_void_p(stream))

    def workspace_of(self, name: str, *shapes: ctypes.Structure | ctypes.Array[Any]) -> int:
        """Bytes of the function's workspace for these shapes."""
        size = getattr(self._library, f"{name}_workspace_bytes")(*_references(shapes))
        self._check(min(size, 0))
        return int(size)

    def call(self, name: str, heads: Sequence[Any], addresses: Sequence[int | None], stream: int) -> None:
        """Any function: structures (None is NULL) and numbers first, then addresses in the header's order."""
        self._call(name, *_references(heads), *_pointers(addresses, len(addresses)), ctypes.c_void_p(stream))

    def _call(self, name: str, *arguments: Any) -> None:
        self._check(getattr(self._library, name)(*arguments))

    def _check(self, code: int) -> None:
        if code:
            raise KernelError(f"{self._library.dmoe_error_string(int(code)).decode()} (code {code})")


def _pointers(addresses: Sequence[int | None], count: int) -> list[ctypes.c_void_p]:
    assert len(addresses) == count
    return [ctypes.c_void_p(address) for address in addresses]  # None is NULL


def _references(values: Sequence[Any]) -> list[Any]:
    return [ctypes.byref(value) if isinstance(value, (ctypes.Structure, ctypes.Array)) else value for value in values]


def gpu_missing() -> str | None:
    """Why there is no NVIDIA GPU to use here, one sentence; None when there is one. Asks the driver itself."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "No NVIDIA driver is installed here (libcuda.so.1 is not found)."
    if code := driver.cuInit(0):
        return f"The NVIDIA driver found no usable GPU (cuInit returned {code})."
    count = ctypes.c_int()
    if driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return "No NVIDIA GPU is visible, though a driver is loaded; check CUDA_VISIBLE_DEVICES."
    return None


def require_gpu() -> None:
    """End the program with exit code 3 and one sentence when there is no GPU, or no library to run on it."""
    reason = gpu_missing()
    if reason is None and not LIBRARY.is_file():
        reason = f"{LIBRARY.relative_to(ROOT)} does not exist; build it with `make plugins`."
    if reason:
        print(reason, file=sys.stderr)
        raise SystemExit(NO_GPU)


def describe_device(device: Any) -> dict[str, Any]:
    """Name, sizes and driver of the GPU a CudaDevice stands for."""
    properties = device._call("cudaGetDeviceProperties", 0)
    try:
        asked = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], text=True,
                               capture_output=True, check=True, timeout=30)
        driver = asked.stdout.splitlines()[0].strip()
    except (OSError, subprocess.SubprocessError, IndexError):
        driver = None  # a container may lack the tool
    return {"name": device.name, "target": device.target, "driver": driver,
            "driver_cuda": device._call("cudaDriverGetVersion"), "multiprocessors": properties.multiProcessorCount,
            "l2_bytes": properties.l2CacheSize, "memory_bytes": properties.totalGlobalMem}


def describe_run(what: str, device: dict[str, Any], library: KernelLibrary | None) -> dict[str, Any]:
    """The head of a result: what was measured where, when, with which versions, by which command."""
    versions = {"python": platform.python_version()}
    for name in ("torch", "numpy", "onnxruntime", "onnxruntime-gpu", "cuda-bindings", "nvidia-cublas",
                 "nvidia-cudnn-cu13", "nvidia-cuda-runtime", "tensorrt", "tensorrt-rtx-cu13-bindings"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"benchmark": what, "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": shlex.join(["python", str(Path(sys.argv[0]).name), *sys.argv[1:]]), "device": device,
            "plugin_build": library.build if library else None, "versions": versions}


def result_path(result: dict[str, Any], folder: Path) -> Path:
    """<what>_<device>_<date>.json in `folder`."""
    device = re.sub(r"[^a-z0-9]+", "-", result["device"]["name"].lower().replace("nvidia", "")).strip("-")
    return folder / f"{result['benchmark']}_{device}_{result['date'][:10]}.json"


def write_result(result: dict[str, Any], folder: Path) -> Path:
    """Write it under its name; one of the same day is replaced."""
    path = result_path(result, folder)
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")  # a program that is killed leaves the file before
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(path)
    return path


class Stopwatch:
    """Times work on a stream with CUDA events."""

    def __init__(self, device: Any, stream: int) -> None:
        """`device`: a CudaDevice."""
        self._device, self._stream = device, stream
        self._events = [device._call("cudaEventCreate") for _ in range(2)]

    def milliseconds(self, work: Callable[[], None]) -> float:
        """Of the work that `work` enqueues."""
        begin, end = self._events
        self._device.record(begin, self._stream)
        work()
        self._device.record(end, self._stream)
        self._device.synchronize(self._stream)
        return float(self._device._call("cudaEventElapsedTime", begin, end))


def time_calls(device: Device, stream: int, calls: Sequence[Callable[[int], None]], replays: int = 20,
               warm_up: int = 3) -> dict[str, Any]:
    """Time of one call, from replays of a graph that makes all `calls` in turn.

    One graph hides the launches; calls on different data keep the L2 cache from helping. Milliseconds: median, and the
    10th and 90th percentile of the replays.
    """
    for call in calls:  # outside a graph once: what is prepared at first use is prepared
        call(stream)
    device.synchronize(stream)
    device.begin_capture(stream)
    try:
        for call in calls:
            call(stream)
    finally:
        graph = device.end_capture(stream)
    watch = Stopwatch(device, stream)
    try:
        for _ in range(warm_up):
            device.launch(graph, stream)
        times = np.array([watch.milliseconds(lambda: device.launch(graph, stream)) for _ in range(replays)])
    finally:
        device.synchronize(stream)
        device.free_graph(graph)
    low, median, high = np.percentile(times / len(calls), [10, 50, 90])
    return {"ms": float(median), "ms_p10": float(low), "ms_p90": float(high), "spread": float((high - low) / median),
            "replays": replays, "calls_per_replay": len(calls)}


def salient_figures(backend: Any, stats: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """What salient steps recomputed, and which of their graphs' steps were recorded."""
    if "salient_capacity" not in settings:
        return {}
    opened = backend.salient_graphs(settings["salient_capacity"]).opened
    return {"salient": {"rows": stats.salient_rows, "steps": len(stats.salient_by_step),
                        "overflows": stats.salient_overflows, "graphs": {
                            str(name): {"placement": executor.placement, "recorded": graphs.recorded,
                                        "replayed": graphs.replayed, "off": graphs.off}
                            for name, (executor, graphs) in opened.items()}}}
