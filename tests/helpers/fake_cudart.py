"""`cuda.bindings.runtime` on host memory: what a GPU would do with the calls, made strict.

Streams run nothing until somebody waits, or a little of it when somebody asks whether they are done; a copy is two
operations, between which its target is poison; fresh memory is poison (NaN as float, absurd as index); every address is
checked against live allocations; recording a stream records. Structs, enums and error texts are the real module's.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
from cuda.bindings import runtime as real

from dmoe_export.runtime.gpu.device import CudaDevice

POISON = 0xC1, 0x7F  # NaN as fp16, bf16 and fp32
OK = real.cudaError_t.cudaSuccess


@dataclass
class _Stream:
    waiting: list = field(default_factory=list)
    done: int = 0
    recording: list | None = None


@dataclass
class _Event:
    stream: int | None = None
    place: int = 0


class FakeCudart:
    def __init__(self, memory=1 << 30, driver=13010, gpus=1, capability=(8, 9)):
        self.memory, self.driver, self.gpus, self.capability = memory, driver, gpus, capability
        self.blocks = {}  # address → (array, keeps the memory alive), device memory
        self.host = {}  # the same, pinned memory
        self.streams = {}
        self.calls = Counter()
        self.used = 0
        self.pace = 1  # operations a stream gets done while somebody asks

    def __getattr__(self, name):
        """Structs and enums are real; so is a function nobody wrote here, which then fails for want of a driver."""
        return getattr(real, name)

    def enqueue(self, stream, work):
        """Work in stream order, replayable."""
        state = self.streams[int(stream)]
        (state.waiting if state.recording is None else state.recording).append(work)

    def recording(self, stream):
        return self.streams[int(stream)].recording is not None

    def view(self, address, size):
        """The bytes at an address; fails loudly outside live device or pinned memory."""
        for blocks in (self.blocks, self.host):
            for start, (array, _) in blocks.items():
                if start <= address and address + size <= start + len(array):
                    return array[address - start:address - start + size]
        raise AssertionError(f"{size} bytes at {address:#x} are no live memory")

    def _drain(self, stream, until=None):
        state = self.streams[stream]
        while state.waiting and (until is None or state.done < until):
            state.waiting.pop(0)()
            state.done += 1

    def _capturing(self):
        return any(s.recording is not None for s in self.streams.values())

    def _new_block(self, size):
        raw = (ctypes.c_uint8 * (size + 256))()
        address = -(-ctypes.addressof(raw) // 256) * 256
        array = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
        array[::2], array[1::2] = POISON
        return address, (array, raw)

    # What follows has the names, arguments and results of the real functions.

    def cudaDriverGetVersion(self):
        return OK, self.driver

    def cudaGetDeviceCount(self):
        if self.driver < 13000:
            return real.cudaError_t.cudaErrorInsufficientDriver, None
        return (OK, self.gpus) if self.gpus else (real.cudaError_t.cudaErrorNoDevice, None)

    def cudaDeviceGetAttribute(self, attr, device):
        return OK, self.capability[attr == real.cudaDeviceAttr.cudaDevAttrComputeCapabilityMinor]

    def cudaGetDeviceProperties(self, device):
        properties = real.cudaDeviceProp()
        properties.name = b"Host Memory".ljust(256, b"\0")
        return OK, properties

    def cudaMemGetInfo(self):
        return OK, self.memory - self.used, self.memory

    def cudaMalloc(self, size):
        self.calls["cudaMalloc"] += 1
        if self._capturing():
            return real.cudaError_t.cudaErrorStreamCaptureUnsupported, None
        if self.used + size > self.memory:
            return real.cudaError_t.cudaErrorMemoryAllocation, None
        self.used += size
        address, block = self._new_block(size)
        self.blocks[address] = block
        return OK, address

    def cudaFree(self, devPtr):
        self.calls["cudaFree"] += 1
        if self._capturing():
            return (real.cudaError_t.cudaErrorStreamCaptureUnsupported,)
        for stream in self.streams:
            self._drain(stream)
        array, _ = self.blocks.pop(devPtr)
        self.used -= len(array)
        return (OK,)

    def cudaHostAlloc(self, size, flags):
        self.calls["cudaHostAlloc"] += 1
        address, block = self._new_block(size)
        self.host[address] = block
        return OK, address

    def cudaFreeHost(self, ptr):
        self.calls["cudaFreeHost"] += 1
        if self._capturing():
            return (real.cudaError_t.cudaErrorStreamCaptureUnsupported,)
        del self.host[ptr]
        return (OK,)

    def cudaStreamCreateWithFlags(self, flags):
        handle = len(self.streams) + 1000
        self.streams[handle] = _Stream()
        return OK, handle

    def cudaStreamSynchronize(self, stream):
        self.calls["cudaStreamSynchronize"] += 1
        if self.recording(stream):
            return (real.cudaError_t.cudaErrorStreamCaptureUnsupported,)
        self._drain(stream)
        return (OK,)

    def cudaMemcpyAsync(self, dst, src, count, kind, stream):
        def begin():
            target = self.view(dst, count)
            target[::2], target[1::2] = POISON

        def end():
            self.view(dst, count)[:] = self.view(src, count)

        end.source = src
        self.calls["cudaMemcpyAsync"] += 1
        self.enqueue(stream, begin)
        self.enqueue(stream, end)
        return (OK,)

    def cudaMemcpy3DAsync(self, p, stream):
        width, height, depth = p.extent.width, p.extent.height, p.extent.depth
        sides = [(int(side.ptr), side.pitch, side.ysize) for side in (p.dstPtr, p.srcPtr)]
        if any(width > pitch or height > ysize for _, pitch, ysize in sides):
            return (real.cudaError_t.cudaErrorInvalidValue,)

        def work():
            (to, *to_strides), (source, *source_strides) = sides
            for layer in range(depth):
                for row in range(height):
                    places = [start + (layer * ysize + row) * pitch for start, (pitch, ysize) in (
                        (to, to_strides), (source, source_strides))]
                    self.view(places[0], width)[:] = self.view(places[1], width)

        work.source = sides[1][0]
        self.calls["cudaMemcpy3DAsync"] += 1
        self.enqueue(stream, work)
        return (OK,)

    def cudaMemsetAsync(self, devPtr, value, count, stream):
        self.enqueue(stream, lambda: self.view(devPtr, count).fill(value))
        return (OK,)

    def cudaEventCreateWithFlags(self, flags):
        return OK, _Event()

    def cudaEventRecord(self, event, stream):
        state = self.streams[stream]
        event.stream, event.place = stream, state.done + len(state.waiting)
        return (OK,)

    def cudaEventSynchronize(self, event):
        if event.stream is not None:
            self._drain(event.stream, event.place)
        return (OK,)

    def cudaEventQuery(self, event):
        state = self.streams.get(event.stream)
        if state is None or state.done >= event.place:
            return (OK,)
        self._drain(event.stream, min(event.place, state.done + self.pace))
        return (real.cudaError_t.cudaErrorNotReady,)

    def cudaStreamWaitEvent(self, stream, event, flags):
        source, place = event.stream, event.place
        if self._capturing():
            return (real.cudaError_t.cudaErrorStreamCaptureIsolation,)
        self.calls["cudaStreamWaitEvent"] += 1
        if source is not None:
            self.enqueue(stream, lambda: self._drain(source, place))
        return (OK,)

    def cudaStreamBeginCapture(self, stream, mode):
        assert mode == real.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
        self.streams[stream].recording = []
        return (OK,)

    def cudaStreamEndCapture(self, stream):
        recorded, self.streams[stream].recording = self.streams[stream].recording, None
        return OK, recorded

    def cudaGraphGetNodes(self, graph, numNodes=0):
        return OK, graph[:numNodes], len(graph)

    def cudaGraphNodeGetType(self, node):
        kinds = real.cudaGraphNodeType
        return OK, kinds.cudaGraphNodeTypeMemcpy if hasattr(node, "source") else kinds.cudaGraphNodeTypeKernel

    def cudaGraphMemcpyNodeGetParams(self, node):
        return OK, SimpleNamespace(srcPtr=SimpleNamespace(ptr=node.source))

    def cudaPointerGetAttributes(self, ptr):
        on_device = any(start <= ptr < start + len(array) for start, (array, _) in self.blocks.items())
        kinds = real.cudaMemoryType
        return OK, SimpleNamespace(type=kinds.cudaMemoryTypeDevice if on_device else kinds.cudaMemoryTypeHost)

    def cudaGraphInstantiate(self, graph, flags):
        self.calls["cudaGraphInstantiate"] += 1
        return OK, list(graph)

    def cudaGraphDestroy(self, graph):
        graph.clear()
        return (OK,)

    def cudaGraphLaunch(self, graphExec, stream):
        self.calls["cudaGraphLaunch"] += 1
        work = list(graphExec)
        assert work, "an empty or destroyed graph"
        self.enqueue(stream, lambda: [step() for step in work])
        return (OK,)

    def cudaGraphExecDestroy(self, graphExec):
        self.calls["cudaGraphExecDestroy"] += 1
        graphExec.clear()
        return (OK,)


class HostDevice(CudaDevice):
    """The CUDA device over a FakeCudart, whose memory ONNX Runtime reaches as the CPU's."""

    kind = "cpu"

    def __init__(self, **options):
        self.fake = FakeCudart(**options)
        super().__init__(self.fake)
