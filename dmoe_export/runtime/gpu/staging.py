"""What goes between host and device in a step: packed into one copy each way, through memory that keeps its place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .cache import Positions
from .call import Layout, Tensor, round_up
from .device import Device, Strided
from .memory import Buffer, Pool


class Staging:
    """Buffers that every step uses, by name: they keep their addresses, so that recorded steps can be replayed."""

    def __init__(self, device: Device, pool: Pool, stream: int) -> None:
        self._device, self._pool, self._stream = device, pool, stream
        self._buffers: dict[str, Buffer] = {}
        self._pinned: dict[str, NDArray[np.uint8]] = {}

    def buffer(self, name: str, size: int) -> int:
        """Address of device memory that lasts, made larger when it must be."""
        if name not in self._buffers or self._buffers[name].size < size:
            self._buffers[name] = self._pool.allocate(size)
        return self._buffers[name].address

    def host(self, name: str, size: int) -> NDArray[np.uint8]:
        """Pinned memory that lasts, likewise."""
        if name not in self._pinned or len(self._pinned[name]) < size:
            self._pinned[name] = self._device.pinned(round_up(size, 4096))
        return self._pinned[name]

    def clear(self) -> None:
        """Give all of it back."""
        self._buffers.clear()
        self._pinned.clear()

    def send(self, layout: Layout, values: Mapping[str, tuple[Any, int]]) -> dict[str, Tensor]:
        """Enqueue copying arrays to the device; the tensors there.

        `values`: for each name an array as in the layout, but for dimensions that may be smaller, and what fills the
        rest; or a number.
        """
        block = self.host("staged", layout.size)
        for name, (value, padding) in values.items():
            array = layout.view(block, name)
            if not isinstance(value, np.ndarray):
                array[:] = value
                continue
            if value.shape != array.shape:
                array[...] = padding
            array[tuple(map(slice, value.shape))] = value
        address = self.buffer("staged", layout.size)
        self._device.copy(address, block.ctypes.data, layout.size, self._stream)
        return layout.tensors(address, block.ctypes.data)

    def send_positions(self, table: Positions) -> None:
        """Enqueue bringing a cache's positions where they are behind; they are the device's once the stream is."""
        if table.stale:
            size = table.values.nbytes
            positions = self.host("positions", size)
            positions[:size].view(np.int64)[:] = table.values.ravel()
            self._device.copy(table.address, positions.ctypes.data, size, self._stream)

    def fetch(self, layout: Layout, address: int, name: str = "results") -> NDArray[np.uint8]:
        """Enqueue fetching arrays; the host's copy of the block, valid until the next fetch of that name."""
        fetched = self.host(name, layout.size)
        self._device.copy(fetched.ctypes.data, address, layout.size, self._stream)
        return fetched

    def fetch_logits(self, address: int, shape: tuple[int, int, int], wanted: int) -> NDArray[Any]:
        """Enqueue fetching the first `wanted` rows of logits [B, M, V]; a view, valid until the next fetch."""
        batch, rows, vocabulary = shape
        row = vocabulary * 4
        size = batch * wanted * row
        fetched = self.host("logits", size)
        self._device.copy_3d(Strided(fetched.ctypes.data, wanted * row, batch), Strided(address, rows * row, batch),
                             (1, batch, wanted * row), self._stream)
        return fetched[:size].view(np.float32).reshape(batch, wanted, -1)
