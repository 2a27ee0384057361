"""A device as the runtime needs it: memory, ordered copies, streams, graphs; and CUDA through cuda-python.

Addresses are plain integers, host or device alike: CUDA's unified addressing tells them apart.
"""

from __future__ import annotations

import ctypes
import importlib
import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...errors import MissingRequirementError

CPU_INSTEAD = "or run on the CPU with --backend onnxruntime"


class DeviceError(MissingRequirementError):
    """A device call failed; the sentence names the call and the device's reason."""


class DeviceMemoryError(DeviceError):
    """The device has no room for an allocation."""


@dataclass(frozen=True)
class Strided:
    """Where a 3-D region lies: its rows start `pitch` bytes apart, its layers `pitch` × `height` bytes."""

    address: int
    pitch: int
    height: int


class Device(Protocol):
    """One accelerator. Work on a stream runs in order; the host sees results after `synchronize`."""

    kind: str  # the name ONNX Runtime has for it
    name: str
    target: str  # compute capability as the manifest spells it, such as sm89

    def allocate(self, size: int) -> int:
        """Uninitialised device memory, aligned to 256 bytes; raises DeviceMemoryError."""
        ...

    def free(self, address: int) -> None:
        """Give memory back; no work may still use it."""
        ...

    def memory(self) -> tuple[int, int]:
        """Bytes free and in all."""
        ...

    def pinned(self, size: int) -> NDArray[np.uint8]:
        """Uninitialised host memory that copies can run beside the host with; lives as long as the array."""
        ...

    def unpin(self) -> None:
        """Give pinned memory of arrays that are gone back."""
        ...

    def stream(self) -> int:
        """A new stream."""
        ...

    def copy(self, to: int, source: int, size: int, stream: int) -> None:
        """Enqueue a copy of `size` bytes."""
        ...

    def copy_3d(self, to: Strided, source: Strided, extent: tuple[int, int, int], stream: int) -> None:
        """Enqueue a copy of (layers, rows, bytes of a row)."""
        ...

    def fill(self, address: int, value: int, size: int, stream: int) -> None:
        """Enqueue setting `size` bytes to `value`."""
        ...

    def synchronize(self, stream: int) -> None:
        """Wait until everything enqueued on the stream is done."""
        ...

    def event(self) -> Any:
        """A new event."""
        ...

    def record(self, event: Any, stream: int) -> None:
        """Enqueue the event."""
        ...

    def wait(self, event: Any) -> None:
        """Wait until the event's last record is reached; returns at once when it was never recorded."""
        ...

    def follow(self, event: Any, stream: int) -> None:
        """Make later work on the stream wait for the event's last record; the host goes on."""
        ...

    def reached(self, event: Any) -> bool:
        """Whether the event's last record is reached; never waits."""
        ...

    def begin_capture(self, stream: int) -> None:
        """From now on work on the stream is recorded, not done."""
        ...

    def end_capture(self, stream: int, host_reads: bool = True) -> Any:
        """End recording; a graph to launch.

        Without `host_reads`, raises DeviceError when copies from host memory were recorded: a replay copies again, from
        memory that may hold something else by then.
        """
        ...

    def launch(self, graph: Any, stream: int) -> None:
        """Enqueue a recorded graph."""
        ...

    def free_graph(self, graph: Any) -> None:
        """Give a graph back."""
        ...


class CudaDevice:
    """The current CUDA device (CUDA_VISIBLE_DEVICES chooses it). `runtime` is the module cuda.bindings.runtime."""

    kind = "cuda"

    def __init__(self, runtime: Any) -> None:
        """Raises MissingRequirementError, one sentence, when there is no driver or no GPU."""
        self._cuda = cuda = runtime
        self.name = "the CUDA device"
        # Arrays die wherever Python drops them, even while steps are recorded: only `pinned` acts on it.
        self._unpinned: deque[int] = deque()
        self._find_gpu()
        attributes = cuda.cudaDeviceAttr
        major, minor = (self._call("cudaDeviceGetAttribute", attribute, 0) for attribute in (
            attributes.cudaDevAttrComputeCapabilityMajor, attributes.cudaDevAttrComputeCapabilityMinor))
        self.target = f"sm{major}{minor}"
        self.name = bytes(self._call("cudaGetDeviceProperties", 0).name).split(b"\0")[0].decode()

    @classmethod
    def open(cls) -> CudaDevice:
        """The machine's GPU; raises MissingRequirementError when package, driver or GPU is missing."""
        try:
            runtime = importlib.import_module("cuda.bindings.runtime")
        except ImportError as error:
            raise MissingRequirementError(f"Running on a GPU needs the package cuda-python ({error}); install it "
                                          f"with: pip install cuda-python, {CPU_INSTEAD}.") from None
        return cls(runtime)

    def _find_gpu(self) -> None:
        cuda = self._cuda
        error, driver = cuda.cudaDriverGetVersion()
        if error != cuda.cudaError_t.cudaSuccess or driver == 0:
            raise MissingRequirementError("No NVIDIA driver is loaded here (nvidia-smi would show it, a container "
                                          f"needs --gpus all); install one, {CPU_INSTEAD}.")
        error, count = cuda.cudaGetDeviceCount()
        if error == cuda.cudaError_t.cudaErrorInsufficientDriver:
            _, needed = cuda.cudaRuntimeGetVersion()
            raise MissingRequirementError(f"The NVIDIA driver knows CUDA {_version(driver)} at most, the installed "
                                          f"cuda-python needs {_version(needed)}; update the driver, {CPU_INSTEAD}.")
        if error != cuda.cudaError_t.cudaSuccess or not count:
            raise MissingRequirementError("No NVIDIA GPU is visible, though a driver is loaded; check nvidia-smi and "
                                          f"CUDA_VISIBLE_DEVICES, {CPU_INSTEAD}.")

    def _call(self, function: str, *arguments: Any) -> Any:
        """Call the CUDA runtime; its single result, if any."""
        cuda = self._cuda
        error, *results = getattr(cuda, function)(*arguments)
        if error == cuda.cudaError_t.cudaSuccess:
            return results[0] if len(results) == 1 else tuple(results)
        kind = DeviceMemoryError if error == cuda.cudaError_t.cudaErrorMemoryAllocation else DeviceError
        text = cuda.cudaGetErrorString(error)[1]
        text = text.decode() if isinstance(text, bytes) else text
        raise kind(f"{function} failed on {self.name}: {text} ({error.name}).")

    def allocate(self, size: int) -> int:
        """See `Device`."""
        return int(self._call("cudaMalloc", size))

    def free(self, address: int) -> None:
        """See `Device`."""
        self._call("cudaFree", address)

    def memory(self) -> tuple[int, int]:
        """See `Device`."""
        free, total = self._call("cudaMemGetInfo")
        return free, total

    def pinned(self, size: int) -> NDArray[np.uint8]:
        """See `Device`; memory of arrays that are gone is given back by the next call."""
        self.unpin()
        address = int(self._call("cudaHostAlloc", max(size, 1), self._cuda.cudaHostAllocDefault))
        block = (ctypes.c_uint8 * size).from_address(address)
        weakref.finalize(block, self._unpinned.append, address).atexit = False  # the process's end frees it
        return np.ctypeslib.as_array(block)

    def unpin(self) -> None:
        """See `Device`."""
        while self._unpinned:
            self._call("cudaFreeHost", self._unpinned.popleft())

    def stream(self) -> int:
        """See `Device`."""
        return int(self._call("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking))

    def copy(self, to: int, source: int, size: int, stream: int) -> None:
        """See `Device`."""
        self._call("cudaMemcpyAsync", to, source, size, self._cuda.cudaMemcpyKind.cudaMemcpyDefault, stream)

    def copy_3d(self, to: Strided, source: Strided, extent: tuple[int, int, int], stream: int) -> None:
        """See `Device`."""
        cuda = self._cuda
        layers, rows, width = extent
        region = cuda.cudaMemcpy3DParms()
        region.dstPtr = cuda.make_cudaPitchedPtr(to.address, to.pitch, to.pitch, to.height)
        region.srcPtr = cuda.make_cudaPitchedPtr(source.address, source.pitch, source.pitch, source.height)
        region.extent = cuda.make_cudaExtent(width, rows, layers)
        region.kind = cuda.cudaMemcpyKind.cudaMemcpyDefault
        self._call("cudaMemcpy3DAsync", region, stream)

    def fill(self, address: int, value: int, size: int, stream: int) -> None:
        """See `Device`."""
        self._call("cudaMemsetAsync", address, value, size, stream)

    def synchronize(self, stream: int) -> None:
        """See `Device`."""
        self._call("cudaStreamSynchronize", stream)

    def event(self) -> Any:
        """See `Device`."""
        return self._call("cudaEventCreateWithFlags", self._cuda.cudaEventDisableTiming)

    def record(self, event: Any, stream: int) -> None:
        """See `Device`."""
        self._call("cudaEventRecord", event, stream)

    def wait(self, event: Any) -> None:
        """See `Device`."""
        self._call("cudaEventSynchronize", event)

    def follow(self, event: Any, stream: int) -> None:
        """See `Device`."""
        self._call("cudaStreamWaitEvent", stream, event, 0)

    def reached(self, event: Any) -> bool:
        """See `Device`."""
        if self._cuda.cudaEventQuery(event)[0] == self._cuda.cudaError_t.cudaErrorNotReady:
            return False
        self._call("cudaEventQuery", event)
        return True

    def begin_capture(self, stream: int) -> None:
        """See `Device`; relaxed, as who is recorded may have to allocate, and so may other threads."""
        self._call("cudaStreamBeginCapture", stream, self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed)

    def end_capture(self, stream: int, host_reads: bool = True) -> Any:
        """See `Device`."""
        recorded = self._call("cudaStreamEndCapture", stream)
        try:
            if not host_reads and (count := self._host_reads(recorded)):
                raise DeviceError(f"A recorded step would copy from the host's memory {count} times at every replay.")
            return self._call("cudaGraphInstantiate", recorded, 0)
        finally:
            self._call("cudaGraphDestroy", recorded)

    def _host_reads(self, graph: Any) -> int:
        """How many copies of a graph read what is no device memory."""
        cuda = self._cuda
        _, count = self._call("cudaGraphGetNodes", graph, 0)
        nodes, _ = self._call("cudaGraphGetNodes", graph, count) if count else ([], 0)
        copy, device = cuda.cudaGraphNodeType.cudaGraphNodeTypeMemcpy, cuda.cudaMemoryType.cudaMemoryTypeDevice
        sources = [self._call("cudaGraphMemcpyNodeGetParams", node).srcPtr.ptr for node in nodes
                   if self._call("cudaGraphNodeGetType", node) == copy]
        return sum(self._call("cudaPointerGetAttributes", source).type != device for source in sources)

    def launch(self, graph: Any, stream: int) -> None:
        """See `Device`."""
        self._call("cudaGraphLaunch", graph, stream)

    def free_graph(self, graph: Any) -> None:
        """See `Device`."""
        self._call("cudaGraphExecDestroy", graph)


def _version(number: int) -> str:
    """CUDA writes 13.1 as 13010."""
    return f"{number // 1000}.{number % 1000 // 10}"
