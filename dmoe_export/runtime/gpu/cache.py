"""The key/value cache on the device: one slab of bucketed length, filled and read by rows."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ...errors import RequestError
from ..backend import Bools, ForwardInputs, ForwardOutputs, Ints
from ..cache import bucketed
from .device import DeviceMemoryError
from .memory import ALIGNMENT, Pool
from .slab import Geometry, Slab, copy_tokens


@dataclass
class Positions:
    """Positions of cached tokens [B, S]: on the host, and a copy on the device which may be behind."""

    values: Ints
    address: int
    stale: bool = True  # the next forward brings them


@dataclass(frozen=True)
class DevicePart:
    """Rows of a slab that lie side by side, as a forward reads them; tensors of a part at multiples of 256 bytes."""

    slab: Slab
    table: Positions  # of all rows of the slab
    first: int
    rows: int

    @property
    def length(self) -> int:
        """S."""
        return self.slab.length

    @property
    def key(self) -> tuple[int, int, int]:
        """What tells the addresses of all parts, besides S."""
        return self.slab.address, self.slab.rows, self.first

    def shape(self, index: int) -> tuple[int, int, int, int]:
        """Of one part: [B, Hkv, S, D]."""
        return self.rows, *self.slab.shape(index)[1:]

    @property
    def positions(self) -> Ints:
        """Positions [B, S] on the host."""
        return self.table.values[self.first:self.first + self.rows]

    @property
    def positions_address(self) -> int:
        """Positions [B, S] int64 on the device."""
        return self.table.address + self.first * self.length * self.table.values.itemsize

    @property
    def aligned(self) -> bool:
        """Whether a forward can read it where it lies."""
        first_parts = [self.positions_address, *(self.part(kind.parts[0]) for kind in self.slab.geometry.kinds)]
        return all(address % ALIGNMENT == 0 for address in first_parts)

    def part(self, index: int) -> int:
        """As `Slab.part`."""
        return self.slab.part(index, self.first)


class DeviceCache:
    """Keys and values of finished blocks on the device, as `HostCache` keeps them on the host; S ≥ 1.

    Has a slab of all its rows for life, which grows and shrinks along S; used from one thread at a time. `lock` is the
    backend's: nobody else's work may be recorded on the stream meanwhile. `capacity`: most tokens S an engine takes.
    """

    def __init__(self, rows: int, geometry: Geometry, pool: Pool, stream: int, lock: threading.RLock,
                 capacity: int | None = None) -> None:
        self._geometry, self._pool, self._stream, self._lock = geometry, pool, stream, lock
        self._capacity = capacity
        self.lengths = np.zeros(rows, np.int64)
        self._gathered: DevicePart | None = None
        self._holds: list[int] = []  # the rows that are gathered there; none after any of the cache has changed
        with lock:
            self.slab, self.table = self._new(rows, 1)

    @property
    def positions(self) -> Ints:
        """Positions [B, S], −1 = empty."""
        return self.table.values

    @property
    def whole(self) -> DevicePart:
        """All rows."""
        return DevicePart(self.slab, self.table, 0, self.slab.rows)

    def part(self, rows: Sequence[int]) -> DevicePart:
        """See `Cache`: a window where the rows lie side by side and aligned, else they are gathered by device copies.

        What was gathered stays until the cache changes; its slab keeps its address as long as the shape repeats.
        """
        window = DevicePart(self.slab, self.table, rows[0], len(rows))
        if list(rows) == list(range(rows[0], rows[0] + len(rows))) and window.aligned:
            return window
        place = self._gathered
        if place is not None and (place.rows, place.length) == (len(rows), self.slab.length):
            if self._holds == list(rows):
                return place
        else:
            place = self._gathered = None  # its memory may serve again
        with self._lock:
            if place is None:
                slab, table = self._new(len(rows), self.slab.length)
                place = self._gathered = DevicePart(slab, table, 0, len(rows))
            chosen = np.asarray(rows)
            for start, stop in _consecutive(chosen):
                copy_tokens(self._pool, (place.slab, start, 0), (self.slab, rows[start], 0), stop - start,
                            place.length, self._stream)
        place.table.values[:], place.table.stale = self.positions[chosen], True
        self._holds = list(rows)
        return place

    def commit(self, inputs: ForwardInputs, outputs: ForwardOutputs, take: Bools,
               rows: Sequence[int] | None = None) -> None:
        """See `Cache`; raises RequestError past the capacity, and then nothing has changed."""
        new: Slab = outputs.keys_values
        counts = take.sum(axis=1)
        places = np.arange(len(take)) if rows is None else np.asarray(rows)
        with self._lock:
            self._reserve(int((self.lengths[places] + counts).max()))
            for i in np.flatnonzero(counts).tolist():
                row = int(places[i])
                place = first = int(self.lengths[row])
                for start, stop in _runs(take[i]):
                    copy_tokens(self._pool, (self.slab, row, place), (new, i, start), 1, stop - start, self._stream)
                    place += stop - start
                self.positions[row, first:place] = inputs.position_ids[i, take[i]]
                self.lengths[row] = place
        self._changed()

    def fetch(self, outputs: ForwardOutputs) -> list[NDArray[np.uint8]]:
        """A forward's new keys, then values, on the host as bytes [B, Hkv, T, D·itemsize]; waits for the device."""
        new: Slab = outputs.keys_values
        with self._lock:
            raw = self._pool.device.pinned(new.bytes)
            self._pool.device.copy(raw.ctypes.data, new.address, new.bytes, self._stream)
            self._pool.device.synchronize(self._stream)
        found = []
        for index in range(len(new.geometry.heads)):
            rows, heads, length, width = new.shape(index)
            start, size = new.part(index) - new.address, rows * heads * length * width * new.geometry.itemsize
            found.append(raw[start:start + size].reshape(rows, heads, length, -1).copy())
        return found

    def clear(self, rows: Sequence[int]) -> None:
        """See `Cache`: their places become empty, nothing moves on the device."""
        self.positions[rows], self.lengths[rows] = -1, 0
        self._changed()

    def leave(self, row: int, last: int) -> None:
        """See `Cache`; a slab twice as long as the longest row needs shrinks."""
        with self._lock:
            if row != last:
                copy_tokens(self._pool, (self.slab, row, 0), (self.slab, last, 0), 1, self.slab.length, self._stream)
                self.positions[row], self.lengths[row] = self.positions[last], self.lengths[last]
            self.slab.clear(self._stream, last)
            self.clear([last])
            need = bucketed(int(self.lengths.max()))
            if 2 * need <= self.slab.length:
                with contextlib.suppress(DeviceMemoryError):  # no room for both at once: the long one stays
                    self._resize(need)

    @property
    def token_bytes(self) -> int:
        """See `Cache`."""
        return self._geometry.token_bytes

    def read(self, row: int, start: int, stop: int) -> Slab:
        """See `Cache`: a slab of its own, filled by the device."""
        with self._lock:
            block = Slab(self._pool, self._geometry, 1, stop - start)
            copy_tokens(self._pool, (block, 0, 0), (self.slab, row, start), 1, stop - start, self._stream)
        return block

    def write(self, row: int, blocks: Sequence[Slab]) -> None:
        """See `Cache`: nothing passes through the host. Raises RequestError past the capacity, as `commit`."""
        first = place = int(self.lengths[row])
        with self._lock:
            self._reserve(first + sum(block.length for block in blocks))
            for block in blocks:
                copy_tokens(self._pool, (self.slab, row, place), (block, 0, 0), 1, block.length, self._stream)
                place += block.length
        self.positions[row, first:place] = np.arange(first, place)
        self.lengths[row] = place
        self._changed()

    def _new(self, rows: int, length: int) -> tuple[Slab, Positions]:
        """An empty slab, and its positions behind it."""
        positions = np.full((rows, length), -1, np.int64)
        slab = Slab(self._pool, self._geometry, rows, length, positions.nbytes)
        slab.clear(self._stream)
        return slab, Positions(positions, slab.extra_address)

    def _changed(self) -> None:
        self.table.stale, self._holds = True, []

    def _reserve(self, length: int) -> None:
        if length <= self.slab.length:
            return
        if self._capacity is not None and length > self._capacity:
            raise RequestError(f"The context has grown to {length} tokens, the engine was built for "
                               f"{self._capacity}; build one with: dmoe-export build BUNDLE --max-context {length}.")
        self._resize(min(bucketed(length), self._capacity or bucketed(length)))

    def _resize(self, length: int) -> None:
        old, positions, used = self.slab, self.positions, int(self.lengths.max())
        self._gathered, self._holds = None, []
        self.slab, self.table = self._new(old.rows, length)
        self.positions[:, :used] = positions[:, :used]
        if used:
            copy_tokens(self._pool, (self.slab, 0, 0), (old, 0, 0), old.rows, used, self._stream)


def _runs(marks: Bools) -> list[tuple[int, int]]:
    """Stretches of True, as [start, stop)."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], marks, [False])).astype(np.int8)))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def _consecutive(rows: Ints) -> list[tuple[int, int]]:
    """Stretches of rows one after the other, as [start, stop) of their indices."""
    edges = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
    return list(pairwise(edges))
