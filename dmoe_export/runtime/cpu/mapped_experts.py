"""The memory ↔ disk tier: experts stay in a mapping of experts.bin of which at most a budget is in memory.

The books are kept in C++ (plugins/cpu/residency.h), where the experts op asks for experts: a forward waits for no
thread of Python.
"""

from __future__ import annotations

import ctypes
import weakref
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..expert_layout import ExpertTensor
from ..library import ExpertSource, load
from ..residency.policy import Costs, Move
from .expert_file import ExpertFile

_COUNTS, _TIMES = ("brought", "missed", "dropped", "peak"), ("bring_seconds", "miss_seconds", "drop_seconds")


class _Totals(ctypes.Structure):
    """DmoeResidencyTotals."""

    _fields_ = [(name, ctypes.c_int64) for name in _COUNTS] + [(name, ctypes.c_double) for name in _TIMES]


class MappedExperts:
    """A `Tier`; its `source` is asked by the experts op of any session over its `weights`, from any thread.

    Must live as long as these sessions run.
    """

    def __init__(self, library: Path, path: Path, layers: list[list[ExpertTensor]], budget: int) -> None:
        """`library`: our CPU kernels. `budget` in bytes, at least an expert's. Raises as `ExpertFile` and
        `load`."""
        self._each = sum(tensor.slab for tensor in layers[0])
        self.capacity = budget // self._each  # experts that may be in memory
        assert self.capacity >= 1, "plan_budget refuses less than a token's experts"
        self._file = ExpertFile(path, layers)
        self.weights: dict[str, NDArray[Any]] = self._file.weights
        self._shape = len(layers), layers[0][0].shape[0]
        addresses = np.array([[self.weights[t.name].ctypes.data for t in layer] for layer in layers], np.uintp)
        slabs = np.array([tensor.slab for tensor in layers[0]], np.int64)
        c = self._c = load(library, "dmoe_residency_create")
        c.dmoe_residency_create.restype = ctypes.c_void_p
        self._books = ctypes.c_void_p(c.dmoe_residency_create(_pointer(addresses), _pointer(slabs), len(layers),
                                                              len(layers[0]), self._shape[1], self.capacity))
        weakref.finalize(self, c.dmoe_residency_destroy, self._books).atexit = False  # the process takes all with it
        self.source = ExpertSource(_address(c.dmoe_residency_acquire), _address(c.dmoe_residency_release),
                                   self._books.value or 0)

    def check(self) -> None:
        """Raise BundleError when the expert file is not the one that was opened."""
        self._file.check()

    def forward_begins(self) -> None:
        """Nothing to do: room is made group by group."""

    def forward_ends(self) -> None:
        """Nothing to do: what is in memory stays until its room is wanted."""

    def move(self, moves: list[Move]) -> None:
        """Residents change at once; who is absent is brought in the background. Who is evicted goes when room is
        wanted."""
        if moves:
            bring, evict = (np.concatenate([move.layer * self._shape[1] + ids[ids >= 0] for move, ids in pairs])
                            .astype(np.int32) for pairs in ([(move, move.bring) for move in moves],
                                                            [(move, move.evict) for move in moves]))
            self._c.dmoe_residency_move(self._books, _pointer(bring), len(bring), _pointer(evict), len(evict))

    def wait(self) -> None:
        """Until everything moved is in memory."""
        self._c.dmoe_residency_wait(self._books)

    def costs(self) -> Costs:
        """As timed so far: bringing an expert in the background, and waiting for one that is missing."""
        totals = self._totals()
        miss = totals.miss_seconds / max(1, totals.missed)
        return Costs(totals.bring_seconds / totals.brought if totals.brought else miss, miss)

    def figures(self) -> dict[str, float]:
        """Bytes and seconds so far, and the most bytes of experts that were in memory at once."""
        totals = self._totals()
        return ({f"{name}_bytes": getattr(totals, name) * self._each for name in _COUNTS}
                | {name: getattr(totals, name) for name in _TIMES})

    def states(self) -> NDArray[np.uint8]:
        """Of every layer and expert: 1 in memory + 2 resident + 4 held by a forward."""
        states = np.zeros(self._shape, np.uint8)
        self._c.dmoe_residency_states(self._books, _pointer(states))
        return states

    def close(self) -> None:
        """Stop the threads; the weights stay usable, and the budget is still kept."""
        self._c.dmoe_residency_close(self._books)

    def _totals(self) -> _Totals:
        totals = _Totals()
        self._c.dmoe_residency_totals(self._books, ctypes.byref(totals))
        return totals


def _pointer(array: NDArray[Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0
