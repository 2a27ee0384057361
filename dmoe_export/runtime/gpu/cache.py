"""The key/value cache on the device: one slab of bucketed length, filled and reordered by device copies."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...errors import RequestError
from ..backend import Bools, ForwardInputs, ForwardOutputs
from ..cache import BUCKET
from .device import Strided
from .memory import Buffer, Pool, padded_height


@dataclass(frozen=True)
class Geometry:
    """What a token takes in the cache: `parts` = 2L (keys of all layers, then values), H heads, bytes of one head."""

    parts: int
    heads: int
    head_dim: int
    itemsize: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one token in one head of one part."""
        return self.head_dim * self.itemsize


class Slab:
    """Keys and values [2L, B, Hkv, length, D] on the device; every part starts at a multiple of 256 bytes.

    `extra` bytes follow the parts (aligned to 256), at `extra_address`.
    """

    def __init__(self, pool: Pool, geometry: Geometry, rows: int, length: int, extra: int = 0) -> None:
        """Contents are uninitialised; see `clear`."""
        self.geometry, self.rows, self.length = geometry, rows, length
        self.pitch = length * geometry.row_bytes
        self.height = padded_height(rows * geometry.heads, self.pitch)
        self.part_bytes = self.pitch * self.height
        self.bytes = geometry.parts * self.part_bytes
        self._pool = pool
        self._buffer: Buffer = pool.allocate(self.bytes + extra)

    @property
    def address(self) -> int:
        """Where the slab starts."""
        return self._buffer.address

    @property
    def extra_address(self) -> int:
        """Where the extra bytes start."""
        return self.address + self.bytes

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of one part: [B, Hkv, length, D]."""
        return self.rows, self.geometry.heads, self.length, self.geometry.head_dim

    def part(self, index: int) -> int:
        """Address of one part: layer l's keys are part l, its values part L + l."""
        return self.address + index * self.part_bytes

    def at(self, row: int, token: int = 0) -> Strided:
        """A row's token in all parts and heads, as `Device.copy_3d` wants it."""
        address = self.address + row * self.geometry.heads * self.pitch + token * self.geometry.row_bytes
        return Strided(address, self.pitch, self.height)

    def clear(self, stream: int) -> None:
        """All zero: the weight 0 of an unused place must not meet a NaN."""
        self._pool.device.fill(self.address, 0, self.bytes, stream)


def copy_tokens(pool: Pool, to: tuple[Slab, int, int], source: tuple[Slab, int, int], rows: int, tokens: int,
                stream: int) -> None:
    """Enqueue copying `tokens` tokens of `rows` rows between (slab, first row, first token) and another."""
    geometry = to[0].geometry
    extent = (geometry.parts, rows * geometry.heads, tokens * geometry.row_bytes)
    pool.device.copy_3d(to[0].at(*to[1:]), source[0].at(*source[1:]), extent, stream)


class DeviceCache:
    """Keys and values of finished blocks on the device, as `HostCache` keeps them on the host; S ≥ 1.

    Belongs to one request; used from one thread at a time. `lock` is the backend's: nobody else's work may be recorded
    on the stream meanwhile. `capacity`: most rows S an engine takes.
    """

    def __init__(self, rows: int, geometry: Geometry, pool: Pool, stream: int, lock: threading.RLock,
                 capacity: int | None = None) -> None:
        self._geometry, self._pool, self._stream, self._lock = geometry, pool, stream, lock
        self._capacity = capacity
        self.positions = np.full((rows, 1), -1, np.int64)
        self.lengths = np.zeros(rows, np.int64)
        self.stale = True  # the device's positions are behind the host's; the next forward brings them
        with lock:
            self.slab = self._cleared(rows, 1)

    @property
    def positions_address(self) -> int:
        """Positions [B, S] int64 on the device."""
        return self.slab.extra_address

    def commit(self, inputs: ForwardInputs, outputs: ForwardOutputs, take: Bools) -> None:
        """Append the tokens marked in take [B, T] to their rows; raises RequestError past the capacity."""
        new: Slab = outputs.keys_values
        counts = take.sum(axis=1)
        with self._lock:
            self._reserve(int((self.lengths + counts).max()))
            for row in np.flatnonzero(counts).tolist():
                place = int(self.lengths[row])
                for start, stop in _runs(take[row]):
                    copy_tokens(self._pool, (self.slab, row, place), (new, row, start), 1, stop - start, self._stream)
                    place += stop - start
                self.positions[row, self.lengths[row]:place] = inputs.position_ids[row, take[row]]
        self.lengths += counts
        self.stale = True

    def fetch(self, outputs: ForwardOutputs) -> NDArray[np.uint8]:
        """A forward's new keys, then values, on the host as bytes [2L, B, Hkv, T, D·itemsize]; waits for the device."""
        new: Slab = outputs.keys_values
        rows, heads, length, _ = new.shape
        with self._lock:
            raw = self._pool.device.pinned(new.bytes)
            self._pool.device.copy(raw.ctypes.data, new.address, new.bytes, self._stream)
            self._pool.device.synchronize(self._stream)
        parts = raw[:new.bytes].reshape(new.geometry.parts, new.height, new.pitch)[:, :rows * heads].copy()
        return parts.reshape(new.geometry.parts, rows, heads, length, new.geometry.row_bytes)

    def clear(self, rows: list[int]) -> None:
        """Forget everything these rows have cached: their places become empty, nothing moves on the device."""
        self.positions[rows], self.lengths[rows] = -1, 0
        self.stale = True

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows only, in this order."""
        with self._lock:
            old = self.slab
            self.slab = self._cleared(len(rows), old.length)
            used = int(self.lengths[rows].max()) if rows else 0
            for place, row in enumerate(rows):
                if used:
                    copy_tokens(self._pool, (self.slab, place, 0), (old, row, 0), 1, used, self._stream)
        self.positions, self.lengths = self.positions[rows], self.lengths[rows]
        self.stale = True

    def _cleared(self, rows: int, length: int) -> Slab:
        slab = Slab(self._pool, self._geometry, rows, length, rows * length * np.dtype(np.int64).itemsize)
        slab.clear(self._stream)
        return slab

    def _reserve(self, length: int) -> None:
        have = self.slab.length
        if length <= have:
            return
        bucket = -(-length // BUCKET) * BUCKET
        if self._capacity is not None:
            if length > self._capacity:
                raise RequestError(f"The context has grown to {length} tokens, the engine was built for "
                                   f"{self._capacity}; build one with: dmoe-export build BUNDLE --max-context "
                                   f"{length}.")
            bucket = min(bucket, self._capacity)
        old, used = self.slab, int(self.lengths.max())
        self.slab = self._cleared(old.rows, bucket)
        if used:
            copy_tokens(self._pool, (self.slab, 0, 0), (old, 0, 0), old.rows, used, self._stream)
        self.positions = np.pad(self.positions, ((0, 0), (0, bucket - have)), constant_values=-1)


def _runs(marks: Bools) -> list[tuple[int, int]]:
    """Stretches of True, as [start, stop)."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], marks, [False])).astype(np.int8)))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]
