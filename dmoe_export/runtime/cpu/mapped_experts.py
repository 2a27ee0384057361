"""The memory ↔ disk tier: experts stay in a mapping of experts.bin of which at most a budget is in memory.

We know what is in memory without asking the kernel, because pages come and go only here, an expert at a time:
`MADV_POPULATE_READ` maps the slabs of an expert before it is used, `MADV_DONTNEED` gives them back when room is
wanted.
Every second slab gets a flag of its own (left out of core dumps), so that each is a mapping by itself: faults map
pages around the one they are for, up to 64 KB or a large folio, but never past the end of their mapping.
"""

from __future__ import annotations

import faulthandler
import math
import mmap
import os
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import BundleError, MissingRequirementError
from ..backend import Ints
from ..residency.policy import Costs, Move
from .expert_layout import ExpertTensor
from .mapped_memory import DONTDUMP, DONTNEED, PAGE, POPULATE_READ, RANDOM, WILLNEED, advise, touch

_READ_AHEAD = 128 << 10  # the kernel reads no more than the device's read-ahead for one call, usually this


@dataclass
class Totals:
    """Running totals of the tier."""

    brought_bytes: int = 0
    missed_bytes: int = 0
    dropped_bytes: int = 0
    bring_seconds: float = 0.0
    miss_seconds: float = 0.0
    drop_seconds: float = 0.0
    peak_bytes: int = 0


class MappedExperts:
    """A `Tier`, and the `ExpertSource` of a session in pieces. Any thread may ask for groups."""

    def __init__(self, path: Path, layers: list[list[ExpertTensor]], budget: int) -> None:
        """`budget` in bytes, at least an expert's. Raises MissingRequirementError where this system's pages or limits
        do not allow it."""
        self._path, self._each = path, sum(tensor.slab for tensor in layers[0])
        self._capacity = budget // self._each  # experts that may be in memory
        assert self._capacity >= 1, "plan_budget refuses less than a token's experts"
        try:
            self._file = os.open(path, os.O_RDONLY)  # keeps the inode: what is checked is what is mapped
        except OSError:
            raise self._changed_file() from None
        weakref.finalize(self, os.close, self._file)
        self._stamp = _stamp(os.fstat(self._file))
        size = max(tensor.offset + tensor.slab * tensor.shape[0] for layer in layers for tensor in layer)
        if size > self._stamp[2]:
            raise self._changed_file()
        try:
            mapping = mmap.mmap(self._file, size, mmap.MAP_SHARED, mmap.PROT_READ)
        except OSError as error:
            raise MissingRequirementError(f"{path} cannot be mapped ({error.strerror}); raise the limit on address "
                                          "space (ulimit -v), or leave the expert budget out.") from None
        self._weights = [[np.frombuffer(mapping, tensor.dtype, math.prod(tensor.shape), tensor.offset)
                          .reshape(tensor.shape) for tensor in layer] for layer in layers]
        # Of every tensor the address of expert 0, and the bytes of each expert.
        self._slabs = [[(array.ctypes.data, tensor.slab) for array, tensor in zip(arrays, layer, strict=True)]
                       for arrays, layer in zip(self._weights, layers, strict=True)]
        shape = len(layers), layers[0][0].shape[0]
        self._part(shape[1])
        self._resident, self._mapped = np.zeros(shape, bool), np.zeros(shape, bool)
        self._held = np.zeros(shape, np.int16)  # in use, by so many
        self._used = np.zeros(shape, np.int64)  # when last, for the order of leaving
        self._clock = 0
        self._changed = threading.Condition()  # guards all of the above
        self._closed = False
        self._worker = ThreadPoolExecutor(1, "bring-experts")
        self._reader = ThreadPoolExecutor(1, "read-experts")
        self.totals = Totals()
        if not faulthandler.is_enabled():  # a file cut short under a product ends in SIGBUS: let it say where
            faulthandler.enable()

    def check(self) -> None:
        """Raise BundleError when the expert file is not the one that was opened, by identity, size and time."""
        try:
            same = _stamp(os.fstat(self._file)) == _stamp(self._path.stat()) == self._stamp
        except OSError:
            same = False
        if not same:
            raise self._changed_file()

    def forward_begins(self) -> None:
        """Nothing to do: room is made group by group."""

    def forward_ends(self) -> None:
        """Nothing to do: what is in memory stays until its room is wanted."""

    def weights(self, layer: int) -> list[NDArray[Any]]:
        """Tensors of a layer, read-only."""
        return self._weights[layer]

    def groups(self, layer: int, experts: Ints) -> Iterator[Ints]:
        """See `ExpertSource`: first those in memory, meanwhile the disk reads the others; these as room allows."""
        with self._changed:
            group = experts[self._mapped[layer, experts]]
            self._held[layer, group] += 1
        absent = np.setdiff1d(experts, group)
        while len(group) or len(absent):
            if not len(group):
                group, absent = self._admit(layer, absent)
            try:
                if len(absent) and not self._closed:
                    self._reader.submit(self._read, layer, self._share(absent, self._room()))
                yield group
            finally:
                self._release(layer, group)
            group = group[:0]

    def move(self, moves: list[Move]) -> None:
        """Residents change at once; who is absent is brought in the background. Who is evicted goes when room is
        wanted."""
        with self._changed:
            for move in moves:
                self._resident[move.layer, move.evict[move.evict >= 0]] = False
                self._resident[move.layer, move.bring] = True
        if moves and not self._closed:
            self._worker.submit(self._bring, moves).add_done_callback(_raise)

    def wait(self) -> None:
        """Until everything moved is in memory."""
        self._worker.submit(lambda: None).result()

    def costs(self) -> Costs:
        """As timed so far: bringing an expert in the background, and waiting for one that is missing."""
        miss = self.totals.miss_seconds / max(1, self.totals.missed_bytes // self._each)
        brought = self.totals.brought_bytes // self._each
        return Costs(self.totals.bring_seconds / brought if brought else miss, miss)

    def figures(self) -> dict[str, float]:
        """Bytes and seconds so far, and the most bytes of experts that were in memory at once."""
        return dict(vars(self.totals))

    def close(self) -> None:
        """Stop the threads; the weights stay usable, and the budget is still kept."""
        if not self._closed:
            self._closed = True
            for pool in (self._worker, self._reader):
                pool.shutdown(wait=False, cancel_futures=True)

    def _changed_file(self) -> BundleError:
        return BundleError(f"{self._path} was changed or removed while it was in use; open the bundle again.")

    def _part(self, experts: int) -> None:
        """Make every slab a mapping by itself, read only where it is asked for."""
        tensors = sorted(tensor for layer in self._slabs for tensor in layer)
        for number, (address, slab) in enumerate(tensors):
            if address % PAGE or slab % PAGE:
                raise MissingRequirementError(
                    f"{self._path} has experts with parts of {slab} bytes, no whole memory pages of {PAGE}, so no "
                    "budget can be kept; leave the expert budget out.")
            second = range(number * experts % 2, experts, 2)  # of all slabs in the file
            apart = all(advise(address + e * slab, slab, DONTDUMP) for e in second)
            if not (apart and advise(address, experts * slab, RANDOM)):
                raise MissingRequirementError(
                    f"This system does not keep {len(tensors) * experts} mappings of experts apart; raise "
                    "vm.max_map_count, or leave the expert budget out.")

    def _room(self) -> int:
        """Experts that could be in memory beside the residents that are; at least one."""
        return max(1, self._capacity - int((self._mapped & self._resident).sum()))

    @staticmethod
    def _share(absent: Ints, room: int) -> Ints:
        """At most `room` of them, from everywhere: ONNX Runtime's threads take ranges of expert ids."""
        return absent[::-(-len(absent) // room)]

    def _admit(self, layer: int, absent: Ints) -> tuple[Ints, Ints]:
        """Bring as many as there is room for, and hold them: these, and the others."""
        start = time.perf_counter()
        with self._changed:
            while not (free := self._capacity - int((self._mapped & (self._held > 0)).sum())) > 0:
                self._changed.wait()  # another thread's group, or an expert on its way
            group = self._share(absent, min(free, self._room()))
            self._enter(layer, group)
        try:
            for expert in group.tolist():
                self._populate(layer, expert)
        except BaseException:
            self._release(layer, group)
            raise
        self.totals.missed_bytes += len(group) * self._each
        self.totals.miss_seconds += time.perf_counter() - start
        return group, np.setdiff1d(absent, group)

    def _enter(self, layer: int, group: Ints) -> None:
        """Make room and count them as mapped and held; under the lock."""
        self._leave(int(self._mapped.sum()) + len(group) - self._capacity)
        self._mapped[layer, group] = True
        self._held[layer, group] += 1
        self.totals.peak_bytes = max(self.totals.peak_bytes, int(self._mapped.sum()) * self._each)

    def _leave(self, count: int) -> None:
        """Give back `count` experts that nobody holds: no resident if possible, and first the longest unused."""
        if count <= 0:
            return
        start = time.perf_counter()
        layers, experts = np.nonzero(self._mapped & (self._held == 0))
        order = np.lexsort((self._used[layers, experts], self._resident[layers, experts]))[:count]
        for layer, expert in zip(layers[order].tolist(), experts[order].tolist(), strict=True):
            for address, slab in self._slabs[layer]:
                advise(address + expert * slab, slab, DONTNEED)
            self._mapped[layer, expert] = False
        self.totals.dropped_bytes += len(order) * self._each
        self.totals.drop_seconds += time.perf_counter() - start

    def _release(self, layer: int, group: Ints) -> None:
        with self._changed:
            self._held[layer, group] -= 1
            self._clock += 1
            self._used[layer, group] = self._clock
            self._changed.notify_all()

    def _read(self, layer: int, group: Ints) -> None:
        """Start reading into the page cache; faults would read page by page."""
        for address, slab in self._slabs[layer]:
            for expert in group.tolist():
                for part in range(0, slab, _READ_AHEAD):
                    advise(address + expert * slab + part, min(_READ_AHEAD, slab - part), WILLNEED)

    def _populate(self, layer: int, expert: int) -> None:
        self._read(layer, np.array([expert]))
        for address, slab in self._slabs[layer]:
            if not advise(address + expert * slab, slab, POPULATE_READ):
                self.check()  # the kernel refuses what the file no longer has
                touch(address + expert * slab, slab)  # before Linux 5.14

    def _bring(self, moves: list[Move]) -> None:
        """Residents that are absent, as far as there is room without another resident's leaving."""
        for move in moves:
            for expert in move.bring.tolist():
                alone = np.array([expert])
                with self._changed:
                    fixed = self._mapped & (self._resident | (self._held > 0))
                    if (self._closed or self._mapped[move.layer, expert] or not self._resident[move.layer, expert]
                            or fixed.sum() >= self._capacity):
                        continue
                    self._enter(move.layer, alone)
                start = time.perf_counter()
                try:
                    self._populate(move.layer, expert)
                except BundleError:
                    return  # the next forward's check says so
                finally:
                    self._release(move.layer, alone)
                self.totals.brought_bytes += self._each
                self.totals.bring_seconds += time.perf_counter() - start


def _raise(done: Future[None]) -> None:
    """A failure in the background is logged, not lost."""
    if not done.cancelled():
        done.result()


def _stamp(file: os.stat_result) -> tuple[int, ...]:
    return file.st_dev, file.st_ino, file.st_size, file.st_mtime_ns, file.st_nlink
