"""The device ↔ pinned host tier: some experts in slots on the device, all of them in pinned host memory.

The engine's experts look a slot up in a table on the device (plugins/kernels/README.md); an expert without one is read
from the pinned master copy by the kernel itself. Every address stays the same for as long as the engine is open, so
recorded graphs stay valid and follow the table. What changes, and in which order:

    evict     table entry → −1          on the forwards' stream: forwards enqueued before it may still read the slot
    bring     slab → the freed slot     on a side stream, which first waits for those forwards and the table edit
    arrive    table entry → slot        on the forwards' stream, before the first forward that finds the copy complete

So no slot is written while a forward may read it, no forward waits for a copy, and a use before it arrived is a miss.
Copies go in batches, the next one when the last has arrived: nobody is evicted before the copy that needs the slot can
start, and who is no longer wanted by then is not copied.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...bundle.engine_entries import EngineEntry, ExpertPool, WeightInput
from ...bundle.reader import Bundle
from ...ops.experts.fragments import Fragments
from ..backend import Bools
from ..expert_layout import fragments_of
from ..residency.budget import machine_memory
from ..residency.policy import Costs, Move
from .call import round_up
from .device import Device, DeviceError, DeviceMemoryError
from .memory import ALIGNMENT, Buffer, Piece, Pool, upload
from .tensorrt_engine import weight_path

_BATCH = 256 << 20  # bytes of copies enqueued at once: 10 ms of PCIe 4
_TIMED = 8  # experts copied to measure what bringing one costs


@dataclass(frozen=True)
class _Weights:
    """One of a layer's tensors: where its experts lie on the host, where its slots on the device."""

    master: int
    slots: int
    slab: int  # bytes of one expert


@dataclass
class _Arrival:
    """Copies on their way: once `event` is reached, these experts of a layer are in these slots."""

    event: Any
    layer: int
    slot_of: dict[int, int]


class DeviceExperts:
    """A `Tier` over an engine with expert pools.

    `bindings`: address and shape of every engine input that belongs to experts. With a slot for every expert there is
    no host copy and nothing to move.
    """

    def __init__(self, bundle: Bundle, entry: EngineEntry, pool: Pool, stream: int, slots: int,
                 lock: threading.RLock) -> None:
        """`slots` per layer; `lock` guards `stream`. Loads the experts; raises DeviceMemoryError, BundleError."""
        self._device: Device = pool.device
        self._pool, self._stream, self._lock = pool, stream, lock
        self._side = self._device.stream()
        weights = {weight.name: weight for weight in entry.weight_inputs}
        experts = weights[entry.expert_pools[0].gate_up].shape[0]
        self.slots = min(slots, experts)
        self.holds_all = self.slots == experts
        if not self.holds_all:
            self._check_host(sum(weights[name].bytes for layer in entry.expert_pools for name, _ in layer.pairs))
        self._keep: list[Any] = []  # memory that lives as long as this
        self.bindings: dict[str, tuple[int, tuple[int, ...]]] = {}
        orders = fragments_of(bundle.manifest)
        self._layers = [self._load(bundle, layer, weights, orders) for layer in entry.expert_pools]
        self._pitch = round_up(experts * 4, ALIGNMENT) // 4
        self._wanted: Bools = np.zeros((len(self._layers), experts), bool)  # residents as the policy has them
        self._assigned = np.full(self._wanted.shape, -1, np.int32)  # whose a slot is, arrived or not
        if self.holds_all:
            self._assigned[:] = np.arange(experts)
        self._table = self._assigned.copy()  # what the next forward sees
        self.shown: Bools = self._table >= 0  # [L, E], what the latest forward saw
        self._free = [list(range(self.slots))[::-1] if not self.holds_all else [] for _ in self._layers]
        self._device_table = self._allocate(len(self._layers) * self._pitch * 4)
        self._staging = [self._device.pinned(len(self._layers) * self._pitch * 4) for _ in range(2)]
        self._sent = [self._device.event() for _ in range(2)]
        self._turn = 0
        for index, layer in enumerate(entry.expert_pools):
            self.bindings[layer.slot_of_expert] = self._device_table + index * self._pitch * 4, (experts,)
        self._arrivals: deque[_Arrival] = deque()  # of one batch, in the order of the side stream
        self._first = 0  # layer that comes first in the next batch
        self._freed, self._spare = self._device.event(), list[Any]()
        self._costs: Costs | None = None
        self._brought_bytes = 0
        weakref.finalize(self, _settle, self._device, self._side).atexit = False
        self._send_table()

    @staticmethod
    def device_bytes(entry: EngineEntry, slots: int) -> int:
        """Device memory that the pools of an engine take."""
        names = {name for layer in entry.expert_pools for name, _ in layer.pairs}
        return sum(weight.bytes // weight.shape[0] * min(slots, weight.shape[0]) for weight in entry.weight_inputs
                   if weight.name in names)

    def _load(self, bundle: Bundle, layer: ExpertPool, weights: dict[str, WeightInput],
              orders: dict[str, Fragments]) -> tuple[_Weights, ...]:
        """Memory of a layer: its pool, and the master copy, which is read from the bundle, and arranged, once."""
        found = []
        for name, pool_name in layer.pairs:
            weight = weights[name]
            path, slab = weight_path(bundle, weight.file, weight.offset, weight.bytes), weight.bytes // weight.shape[0]
            slots = self._allocate(self.slots * slab)
            piece = Piece(slots, path, weight.offset, weight.bytes, orders.get(name))
            if self.holds_all:
                upload(self._device, self._stream, [piece])
                master = slots  # bound, never read
            else:
                host = self._pinned(weight.bytes)
                piece.read(0, host[:weight.bytes])
                master = host.ctypes.data
            self.bindings[name] = master, tuple(weight.shape)
            self.bindings[pool_name] = slots, (self.slots, *weight.shape[1:])
            found.append(_Weights(master, slots, slab))
        return tuple(found)

    @staticmethod
    def _check_host(needed: int) -> None:
        """Before minutes of loading."""
        if needed > machine_memory():
            raise DeviceMemoryError(
                f"An expert budget on the device keeps all {needed / 1e9:.2f} GB of experts in host memory, this "
                f"machine has {machine_memory() / 1e9:.2f} GB; use --backend onnxruntime, which leaves them on disk.")

    def _allocate(self, size: int) -> int:
        buffer: Buffer = self._pool.allocate(size)
        self._keep.append(buffer)
        return buffer.address

    def _pinned(self, size: int) -> Any:
        try:
            self._keep.append(self._device.pinned(size))
        except DeviceMemoryError as error:
            raise DeviceMemoryError(
                f"The host has no room to pin {size / 1e9:.2f} GB more of experts ({error}); a budget below all "
                "experts needs all of them in host memory: raise the limit of locked memory, or free memory.") from None
        return self._keep[-1]

    def check(self) -> None:
        """Nothing to check: the master copy is this process's own, whatever becomes of the file."""

    def forward_begins(self) -> None:
        """Show the next forward what has arrived; does not wait for anything."""
        with self._lock:
            if self._arrived() and not self._start():
                self._send_table()
            self.shown = self._table >= 0

    def forward_ends(self) -> None:
        """Nothing to do: slots stay as they are."""

    def move(self, moves: list[Move]) -> None:
        """Start copying on the side stream, at once or when the copies of earlier moves have arrived."""
        if self.holds_all or not moves:
            return
        with self._lock:
            for move in moves:
                self._wanted[move.layer, move.evict[move.evict >= 0]] = False
                self._wanted[move.layer, move.bring] = True
            self._start()

    def wait(self) -> None:
        """Until everything that was moved has arrived; the next forward sees it."""
        while self._arrivals:
            self._device.synchronize(self._side)
            self.forward_begins()

    def costs(self) -> Costs:
        """Copies timed once. A miss reads the same bytes over the same link, so it is taken to cost the same.

        (On a GPU a miss may well cost more, since the forward waits for it; not measured.)
        """
        if self._costs is None:
            with self._lock:
                layer = self._layers[0]
                scratch = [self._pool.allocate(weights.slab) for weights in layer]
                self._side_follows()
                self._device.synchronize(self._side)
                start = time.perf_counter()
                for _ in range(_TIMED):
                    for weights, place in zip(layer, scratch, strict=True):
                        self._device.copy(place.address, weights.master, weights.slab, self._side)
                self._device.synchronize(self._side)
                seconds = (time.perf_counter() - start) / _TIMED
            self._costs = Costs(seconds, seconds)
        return self._costs

    def figures(self) -> dict[str, float]:
        """Bytes brought so far, and those of the pools."""
        pools = sum(self.slots * weights.slab for layer in self._layers for weights in layer)
        return {"brought_bytes": self._brought_bytes, "peak_bytes": pools}

    def close(self) -> None:
        """Let copies end; what is resident stays, and stays right."""
        self._device.synchronize(self._side)

    def _arrived(self) -> bool:
        """Enter into the table whose copies are complete; whether there were any."""
        before = len(self._arrivals)
        while self._arrivals and self._device.reached(self._arrivals[0].event):
            arrival = self._arrivals.popleft()
            self._spare.append(arrival.event)
            for expert, slot in arrival.slot_of.items():
                self._table[arrival.layer, expert] = slot
        return len(self._arrivals) < before

    def _start(self) -> bool:
        """Enqueue the next batch if the last one has arrived: evictions, then copies; whether the table was sent."""
        if self._arrivals:
            return False
        room, batch = _BATCH, []
        for layer in np.roll(np.arange(len(self._layers)), -self._first).tolist():
            each = sum(weights.slab for weights in self._layers[layer])
            slot_of = self._assign(layer, -(-room // each))
            room -= each * len(slot_of)
            if slot_of:
                batch.append((layer, slot_of))
            if room <= 0:
                self._first = layer
                break
        if batch:
            self._send_table()
            self._side_follows()
        for layer, slot_of in batch:
            for expert, slot in slot_of.items():
                for weights in self._layers[layer]:
                    self._device.copy(weights.slots + slot * weights.slab, weights.master + expert * weights.slab,
                                      weights.slab, self._side)
                    self._brought_bytes += weights.slab
            event = self._spare.pop() if self._spare else self._device.event()
            self._device.record(event, self._side)
            self._arrivals.append(_Arrival(event, layer, slot_of))
        return bool(batch)

    def _assign(self, layer: int, most: int) -> dict[int, int]:
        """Slots for at most `most` wanted experts that have none; who has to leave for them is out of the table."""
        assigned, wanted, slot_of = self._assigned[layer], self._wanted[layer], {}
        leave = np.flatnonzero(~wanted & (assigned >= 0)).tolist()
        for expert in np.flatnonzero(wanted & (assigned < 0)).tolist()[:most]:
            if self._free[layer]:
                slot = self._free[layer].pop()
            else:
                leaves = leave.pop()
                slot = int(assigned[leaves])
                assigned[leaves] = self._table[layer, leaves] = -1
            assigned[expert] = slot_of[expert] = slot
        return slot_of

    def _side_follows(self) -> None:
        """The side stream waits for what the forwards' stream has been given so far."""
        self._device.record(self._freed, self._stream)
        self._device.follow(self._freed, self._side)

    def _send_table(self) -> None:
        """Enqueue the table, from one of two pinned copies, so that the last one may still be on its way."""
        staging, sent = self._staging[self._turn], self._sent[self._turn]
        self._device.wait(sent)
        rows = staging[:len(self._layers) * self._pitch * 4].view(np.int32).reshape(len(self._layers), self._pitch)
        rows[:, :self._table.shape[1]] = self._table
        self._device.copy(self._device_table, staging.ctypes.data, rows.nbytes, self._stream)
        self._device.record(sent, self._stream)
        self._turn = 1 - self._turn


def _settle(device: Device, stream: int) -> None:
    """Copies end before the memory they use goes."""
    with contextlib.suppress(DeviceError):  # nobody is left to be told
        device.synchronize(stream)
