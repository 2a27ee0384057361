"""The memory ↔ disk tier: experts stay in the mapped experts.bin, of which at most a budget is in memory.

ONNX Runtime's CPU provider maps float32 experts and reads only those that are used, so a miss needs nothing from us:
the kernel brings its pages in. What we do is bring residents in ahead (a background thread), and give non-residents
back while a forward runs: a second thread watches the resident memory and drops their pages, layer after layer behind
the forward, whenever the experts take more than the budget. Dropping is lossless (the mapping is never written), and
dropping a page that is about to be read costs a fault, not a wrong token.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..bundle.manifest import ExpertsEntry
from ..errors import BundleError, MissingRequirementError
from .backend import Bools
from .budget import RESERVE
from .mapped_memory import (
    DONTNEED,
    POPULATE_READ,
    WILLNEED,
    FileIdentity,
    Span,
    addresses,
    advise,
    file_backed_bytes,
    touch,
)
from .residency import Costs, Move

_FILL_RATE = 8e9  # bytes/s: nothing fills memory faster, so that the watcher may sleep until the budget could be full
_CALIBRATE_EVERY = 0.25  # seconds; walking the page tables of 8 GB takes about 10 ms
_SAMPLES = 4  # experts whose faults are timed for the costs


@dataclass
class Totals:
    """Running totals of the tier."""

    brought_bytes: int = 0
    dropped_bytes: int = 0
    bring_seconds: float = 0.0
    drop_seconds: float = 0.0
    peak_bytes: int = 0


class MappedExperts:
    """A `Tier` over the mappings that one session has of an expert file."""

    def __init__(self, path: Path, entry: ExpertsEntry, experts: int, spans: list[Span], budget: int) -> None:
        """`spans`: the session's mappings of `path`; `budget` in bytes. Starts the watching thread."""
        self._path, self._experts, self._budget, self._identity = path, experts, budget, FileIdentity.of(path)
        self._file = os.open(path, os.O_RDONLY)  # keeps the inode: what is checked is what is mapped
        self._stamp = _stamp(os.fstat(self._file))
        slabs = (entry.gate_up_slab_bytes, entry.down_slab_bytes)
        self._tensors = [[(address, slab) for offset, slab in zip((layer.gate_up_offset, layer.down_offset), slabs,
                                                                  strict=True)
                          for address in addresses(spans, offset, experts * slab)] for layer in entry.layers]
        if any(len(tensors) < 2 for tensors in self._tensors):
            raise MissingRequirementError(f"ONNX Runtime has not mapped {path} (it copies weights it cannot use as "
                                          "they lie), so no budget can be kept; leave the expert budget out.")
        self._brim = budget * (1 - RESERVE / 2)  # half the reserve is for what comes while the watcher is not running
        self._resident: Bools = np.zeros((len(entry.layers), experts), bool)
        self._statm = os.open("/proc/self/statm", os.O_RDONLY)
        self._awake, self._lock, self._giving_back = threading.Event(), threading.Lock(), threading.RLock()
        self._other, self._calibrated = 0, 0.0
        self._calibrate()
        self._costs: Costs | None = None
        self._cursor = 0
        self._busy = 0
        self._closed = False
        self._worker = ThreadPoolExecutor(1, "bring-experts")
        self.totals = Totals()
        if not faulthandler.is_enabled():  # a file cut short under a forward ends in SIGBUS: let it say where
            faulthandler.enable()
        self._watcher = threading.Thread(target=self._watch, name="watch-experts", daemon=True)
        self._watcher.start()

    def check(self) -> None:
        """Raise BundleError when the expert file is not the one that was opened, by identity, size and time."""
        try:
            same = _stamp(os.fstat(self._file)) == _stamp(self._path.stat()) == self._stamp
        except OSError:
            same = False
        if not same:
            raise BundleError(f"{self._path} was changed or removed while it was in use; open the bundle again.")

    def forward_begins(self) -> None:
        """The watcher looks from now on."""
        self._cursor = 0
        self._work(1)

    def forward_ends(self) -> None:
        """What is mapped stays until room is wanted; while over budget, what else is in memory is measured anew."""
        self._work(-1)
        if self._expert_bytes() > self._budget * (1 - RESERVE):
            self._calibrate()
            if self._expert_bytes() > self._budget:
                self._drop()

    def move(self, moves: list[Move]) -> None:
        """Residents change at once; their pages are brought in the background. An evicted expert's go when room is
        wanted."""
        for move in moves:
            evict = move.evict[move.evict >= 0]
            self._resident[move.layer, evict] = False
            self._resident[move.layer, move.bring] = True
        if moves:
            self._work(1)
            self._worker.submit(self._bring, moves).add_done_callback(self._brought)

    def wait(self) -> None:
        """Until everything moved is in memory."""
        self._worker.submit(lambda: None).result()

    def costs(self) -> Costs:
        """Timed once: faults of a few experts that are not resident, taken in one piece and page by page."""
        if self._costs is None:
            self.wait()
            layer = len(self._tensors) // 2
            free = np.flatnonzero(~self._resident[layer])
            chosen = (free if len(free) else np.arange(self._experts))[:: max(1, len(free) // (2 * _SAMPLES))]
            ways = (_populate, touch)
            seconds = [0.0, 0.0]
            for i, expert in enumerate(chosen[:2 * _SAMPLES]):
                parts = [(address + int(expert) * slab, slab) for address, slab in self._tensors[layer]]
                for part in parts:
                    advise(*part, DONTNEED)
                start = time.perf_counter()
                for part in parts:
                    ways[i % 2](*part)
                seconds[i % 2] += time.perf_counter() - start
            counts = np.maximum(np.bincount(np.arange(min(len(chosen), 2 * _SAMPLES)) % 2, minlength=2), 1)
            self._costs = Costs(*(second / count for second, count in zip(seconds, counts.tolist(), strict=True)))
        return self._costs

    def figures(self) -> dict[str, float]:
        """Bytes and seconds so far, and the peak of the experts' resident memory as the watcher saw it."""
        return dict(vars(self.totals))

    def close(self) -> None:
        """Stop both threads; afterwards no page is given back, so that the session may go."""
        with self._giving_back:
            if self._closed:
                return
            self._closed = True
        self._awake.set()
        self._worker.shutdown(wait=False, cancel_futures=True)
        if threading.current_thread() is not self._watcher:  # the collector may call from any thread
            self._watcher.join()
        os.close(self._file)

    def _work(self, change: int) -> None:
        with self._lock:
            self._busy += change
            self._awake.set() if self._busy else self._awake.clear()

    def _bring(self, moves: list[Move]) -> None:
        start = time.perf_counter()
        for move in moves:
            for expert in move.bring.tolist():
                if self._closed or not self._resident[move.layer, expert]:
                    continue
                for address, slab in self._tensors[move.layer]:
                    _populate(address + expert * slab, slab)
                    self.totals.brought_bytes += slab
        self.totals.bring_seconds += time.perf_counter() - start

    def _brought(self, done: Future[None]) -> None:
        self._work(-1)
        if not done.cancelled():
            done.result()

    def _expert_bytes(self) -> int:
        return file_backed_bytes(self._statm) - self._other

    def _calibrate(self) -> None:
        """Measure what else is file-backed: libraries, dense weights. It grows as they are used, so we err upwards."""
        with self._giving_back:
            before, experts = file_backed_bytes(self._statm), self._identity.resident_bytes()
            # Pages come, and under pressure go, while the tables are walked: the lower count keeps the error upwards.
            self._other = min(before, file_backed_bytes(self._statm)) - experts
        self._calibrated = time.monotonic()

    def _watch(self) -> None:
        with contextlib.suppress(OSError):  # on a busy machine it should not queue; only root may ask for that
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), -10)
        while not self._closed:
            self._awake.wait()
            held = self._expert_bytes()
            self.totals.peak_bytes = max(self.totals.peak_bytes, held)
            if held > self._brim:
                self._drop()
            if time.monotonic() - self._calibrated > _CALIBRATE_EVERY:
                self._calibrate()
            time.sleep(min(0.02, max(0.0005, (self._brim - self._expert_bytes()) / _FILL_RATE)))
        os.close(self._statm)

    def _drop(self) -> None:
        """Give pages of non-residents back, layer by layer behind the forward, until the reserve is free."""
        start, goal = time.perf_counter(), self._budget * (1 - RESERVE)
        before = held = self._expert_bytes()
        for _ in range(len(self._tensors)):
            if held <= goal:
                break
            with self._giving_back:
                for first, count in _runs(~self._resident[self._cursor]):
                    for address, slab in self._tensors[self._cursor]:
                        if not self._closed:
                            advise(address + first * slab, count * slab, DONTNEED)
            self._cursor = (self._cursor + 1) % len(self._tensors)
            held = self._expert_bytes()
        self.totals.dropped_bytes += max(0, before - held)
        self.totals.drop_seconds += time.perf_counter() - start


def _populate(address: int, length: int) -> None:
    advise(address, length, WILLNEED)  # reads exactly this range; faults would read around it
    advise(address, length, POPULATE_READ)  # Linux 5.14; before, the first use maps the pages


def _runs(wanted: Bools) -> list[tuple[int, int]]:
    """Runs of true places: (first, count)."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], wanted, [False]])))
    return [(int(first), int(stop - first)) for first, stop in edges.reshape(-1, 2)]


def _stamp(file: os.stat_result) -> tuple[int, ...]:
    return file.st_dev, file.st_ino, file.st_size, file.st_mtime_ns, file.st_nlink
