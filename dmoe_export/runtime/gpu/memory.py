"""Device memory that is reused, and weights that are brought to it once."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...ops.experts.fragments import Fragments
from .device import Device, DeviceError, DeviceMemoryError

ALIGNMENT = 256  # bytes: what CUDA allocates at and TensorRT asks of tensor addresses
IDLE_LIMIT = 512 << 20
CHUNK = 32 << 20


class Buffer:
    """Device memory that goes back to its pool when nobody refers to it any more."""

    def __init__(self, pool: Pool, address: int, size: int) -> None:
        self.address, self.size = address, size
        self._pool = pool

    def __del__(self) -> None:
        self._pool.give_back(self.address)


class Pool:
    """Allocations of one stream.

    A freed block serves the next request of its size at once: work on the stream runs in order, so whoever used it
    before is done by then. Repeated requests so meet the same addresses, which lets recorded graphs be replayed.
    """

    def __init__(self, device: Device, idle_limit: int = IDLE_LIMIT) -> None:
        self.device, self._idle_limit = device, idle_limit
        self._blocks: dict[int, int] = {}  # address → size, of all blocks
        self._idle: list[int] = []  # the latest freed is last
        # Buffers die wherever Python drops them, even inside a capture: only `allocate` acts on it.
        self._returned: deque[int] = deque()
        weakref.finalize(self, _free_all, device, self._blocks).atexit = False  # the process's end frees it

    def allocate(self, size: int) -> Buffer:
        """Uninitialised memory; raises DeviceMemoryError with the size asked for."""
        size = max(1, -(-size // ALIGNMENT)) * ALIGNMENT
        self._collect()
        fitting = [address for address in self._idle if self._blocks[address] == size]
        if fitting:
            self._idle.remove(min(fitting))  # the lowest, so that like requests meet like addresses
            return Buffer(self, min(fitting), size)
        self._trim(self._idle_limit)
        try:
            address = self.device.allocate(size)
        except DeviceMemoryError:
            self._trim(0)
            address = self._last_try(size)
        self._blocks[address] = size
        return Buffer(self, address, size)

    def give_back(self, address: int) -> None:
        """Called by a dying Buffer, from any thread."""
        self._returned.append(address)

    def release(self) -> None:
        """Free every block that nobody refers to, and pinned memory likewise."""
        self._collect()
        self._trim(0)
        self.device.unpin()

    def _collect(self) -> None:
        while self._returned:
            self._idle.append(self._returned.popleft())

    def _trim(self, limit: int) -> None:
        """Free the blocks that lie idle longest until `limit` bytes are left idle."""
        idle = sum(self._blocks[address] for address in self._idle)
        while idle > limit:
            address = self._idle.pop(0)
            self.device.free(address)  # waits for the device, so work that still uses the block ends first
            idle -= self._blocks.pop(address)

    def _last_try(self, size: int) -> int:
        try:
            return self.device.allocate(size)
        except DeviceMemoryError:
            free, total = self.device.memory()
            raise DeviceMemoryError(
                f"{self.device.name} has {free / 1e9:.2f} of {total / 1e9:.1f} GB free, {size / 1e9:.2f} GB more are "
                "needed; use a smaller batch, a shorter context or a smaller precision.") from None


def _free_all(device: Device, blocks: dict[int, int]) -> None:
    with contextlib.suppress(DeviceError):  # while the process ends, the driver may be gone, and the memory with it
        for address in blocks:
            device.free(address)


class Piece(NamedTuple):
    """A part of a file that goes to memory; `order`: in which it is arranged there, None for as it lies."""

    address: int
    path: Path
    offset: int
    size: int
    order: Fragments | None = None

    def read(self, start: int, target: NDArray[np.uint8]) -> None:
        """What belongs into memory from `start` on; whole bands of an order."""
        data = np.memmap(self.path, np.uint8, "r", self.offset + start, target.shape)
        if self.order:
            self.order.arrange(data, target)
        else:
            target[:] = data


def upload(device: Device, stream: int, pieces: Iterable[Piece], chunk: int = CHUNK) -> None:
    """Copy parts of files to the device, through two pinned chunks.

    While one chunk travels the other is read from the file. Returns when everything has arrived.
    """
    pieces = list(pieces)
    chunks = [min(piece.size, _chunk(piece.order, chunk)) for piece in pieces]
    staging = [device.pinned(max(chunks, default=0)) for _ in range(2)]
    events = [device.event() for _ in range(2)]
    turn = 0
    for piece, most in zip(pieces, chunks, strict=True):
        for start in range(0, piece.size, most or 1):
            count = min(most, piece.size - start)
            device.wait(events[turn])  # its chunk has left
            piece.read(start, staging[turn][:count])
            device.copy(piece.address + start, staging[turn].ctypes.data, count, stream)
            device.record(events[turn], stream)
            turn = 1 - turn
    device.synchronize(stream)


def _chunk(order: Fragments | None, chunk: int) -> int:
    """About `chunk` bytes, in whole bands of an order."""
    return max(chunk // order.band_bytes, 1) * order.band_bytes if order else chunk


def padded_height(rows: int, pitch: int) -> int:
    """Least height ≥ rows at which layers of rows of `pitch` bytes start at multiples of ALIGNMENT."""
    step = ALIGNMENT // math.gcd(ALIGNMENT, pitch)
    return -(-rows // step) * step
