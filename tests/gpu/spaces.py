"""Where kernel checks run: the CUDA library on a GPU, or the emulated one on the stand-in in fake_cudart.py.

Both sides have streams, graphs, poisoned memory and fences; a check does not know which one it is on.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gpu_common import ExpertsShapeC, KernelLibrary, QuantisationC, RouteAttributesC

from .slabs import Slabs

FENCE = 256  # bytes behind every output that must stay as they were
POISON = 0xFF  # NaN as fp16, bf16 and fp32; −1 as an integer


class Array:
    """A typed region of device memory with a fence behind it; freed with the object."""

    def __init__(self, space: Space, shape: tuple[int, ...], dtype: Any) -> None:
        self._space, self.shape, self.dtype = space, tuple(shape), np.dtype(dtype)
        self.size = int(np.prod(shape)) * self.dtype.itemsize
        self.address = space.device.allocate(self.size + FENCE)

    def __del__(self) -> None:
        self._space.device.free(self.address)  # waits for the work that uses it

    def poison(self, stream: int) -> None:
        """Fill it and the fence, so that what nobody writes shows."""
        self._space.device.fill(self.address, POISON, self.size + FENCE, stream)

    def put(self, values: np.ndarray, stream: int) -> None:
        """Copy from the host; returns when it is there."""
        values = np.ascontiguousarray(values, self.dtype)
        assert values.shape == self.shape
        self._send(self.address, values, stream)

    def put_row(self, index: int, values: np.ndarray, stream: int) -> None:
        """Copy one entry of the first axis from the host, and wait."""
        values = np.ascontiguousarray(values, self.dtype)
        assert values.shape == self.shape[1:]
        self._send(self.address + index * values.nbytes, values, stream)

    def copy_row(self, index: int, source: Array, row: int, stream: int) -> None:
        """Enqueue a copy of one entry of another array's first axis; nobody waits."""
        assert self.shape[1:] == source.shape[1:] and self.dtype == source.dtype
        size = source.size // source.shape[0]
        self._space.device.copy(self.address + index * size, source.address + row * size, size, stream)

    def _send(self, address: int, values: np.ndarray, stream: int) -> None:
        staged = self._space.staging(values.nbytes)
        staged[:] = values.reshape(-1).view(np.uint8)
        self._space.device.copy(address, staged.ctypes.data, values.nbytes, stream)
        self._space.device.synchronize(stream)

    def get(self, stream: int) -> np.ndarray:
        """A copy on the host; with a poisoned array, fails when something wrote behind the end."""
        host = self._space.staging(self.size + FENCE)
        self._space.device.copy(host.ctypes.data, self.address, self.size + FENCE, stream)
        self._space.device.synchronize(stream)
        assert (host[self.size:] == POISON).all(), "written behind the end of an output"
        return host[:self.size].view(self.dtype).reshape(self.shape).copy()


class Space:
    """A device, a kernel library and how a kernel call gets onto a stream."""

    def __init__(self, device: Any, library: KernelLibrary, enqueue: Callable[[int, Callable[[], None]], None]) -> None:
        """`enqueue(stream, work)`: now on CUDA, as its launches wait for the stream; later on the stand-in."""
        self.device, self.library, self._enqueue = device, library, enqueue
        self.stream, self.other_stream = device.stream(), device.stream()
        self._staging = device.pinned(1 << 20)
        self._kept: dict[Any, list[Array]] = {}

    def kept(self, slabs: Slabs) -> list[Array]:
        """Weights on the device, sent once and there until the end."""
        if slabs.of not in self._kept:
            arrays = [self.empty(part.shape, part.dtype) for part in slabs.stored]
            for array, part in zip(arrays, slabs.stored, strict=True):
                for row, values in enumerate(part):  # in pieces: pinned memory for all of it takes long to get
                    array.put_row(row, values, self.stream)
            self._kept[slabs.of] = arrays
        return self._kept[slabs.of]

    def close(self) -> None:
        """Forget what is kept, while there is a device to give it back to."""
        self._kept.clear()

    def staging(self, size: int) -> np.ndarray:
        """Pinned memory for one copy; whoever uses it waits for the copy."""
        if len(self._staging) < size:
            self._staging = self.device.pinned(size)
        return self._staging[:size]

    def array(self, values: np.ndarray) -> Array:
        """A copy of `values` on the device, fenced like everything else."""
        array = Array(self, values.shape, values.dtype)
        array.poison(self.stream)
        array.put(values, self.stream)
        return array

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Poisoned memory."""
        array = Array(self, shape, dtype)
        array.poison(self.stream)
        self.device.synchronize(self.stream)
        return array

    def route(self, attributes: RouteAttributesC, shape: tuple[int, int, int], addresses: list[int | None],
              stream: int) -> None:
        """Enqueue `dmoe_block_route` on logits of `shape`."""
        self._enqueue(stream, lambda: self.library.route(attributes, *shape, addresses, stream))

    def experts(self, shape: ExpertsShapeC, addresses: list[int | None], stream: int) -> None:
        """Enqueue `dmoe_experts`."""
        self._enqueue(stream, lambda: self.library.experts(shape, addresses, stream))

    def experts_quantised(self, shape: ExpertsShapeC, quantisation: QuantisationC, addresses: list[int | None],
                          stream: int) -> None:
        """Enqueue `dmoe_experts_quantised`."""
        self._enqueue(stream, lambda: self.library.experts_quantised(shape, quantisation, addresses, stream))

    def head(self, shape: Any, attributes: Any, addresses: list[int | None], stream: int) -> None:
        """Enqueue `dmoe_head`."""
        self._enqueue(stream, lambda: self.library.head(shape, attributes, addresses, stream))

    def self_attention(self, shape: Any, addresses: list[int | None], stream: int) -> None:
        """Enqueue `dmoe_self_attention`."""
        self._enqueue(stream, lambda: self.library.self_attention(shape, addresses, stream))

    def call(self, name: str, heads: tuple[Any, ...], addresses: list[int | None], stream: int) -> None:
        """Enqueue a function of dmoe_kernels.h: structures and numbers first, then addresses, then the stream."""
        self._enqueue(stream, lambda: self.library.call(name, heads, addresses, stream))

    def recorded(self, work: Callable[[int], None]) -> Any:
        """A CUDA graph of what `work(stream)` enqueues."""
        self.device.begin_capture(self.stream)
        try:
            work(self.stream)
        finally:
            graph = self.device.end_capture(self.stream)
        return graph

    def replay(self, graph: Any, stream: int) -> None:
        """Run a graph and wait."""
        self.device.launch(graph, stream)
        self.device.synchronize(stream)


def cuda_space(device: Any, library: Path) -> Space:
    """The real thing."""
    return Space(device, KernelLibrary(library), lambda stream, work: work())


def emulated_space(device: Any, library: Path) -> Space:
    """`device`: a HostDevice."""
    return Space(device, KernelLibrary(library), device.fake.enqueue)
