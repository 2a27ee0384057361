"""Expert sources written in Python, as C functions: for tests alone, they wait for the interpreter."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np

from dmoe_export.runtime.library import ExpertSource

ACQUIRE = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32)
RELEASE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32)
_alive = []  # callbacks live as long as sessions may


def as_source(source) -> ExpertSource:
    """Of an object with acquire(gate_up, experts) -> count and release(gate_up, experts).

    What it raises is put into its list `failures`, because C has no exceptions.
    """
    source.failures = []

    def guarded(work: Callable, gate_up: int, experts: int, count: int) -> int:
        ids = np.frombuffer((ctypes.c_int32 * count).from_address(experts), np.int32)
        try:
            return work(gate_up, ids) or 0
        except BaseException as error:
            source.failures.append(error)
            return -1

    callbacks = (ACQUIRE(lambda _, *call: guarded(source.acquire, *call)),
                 RELEASE(lambda _, *call: guarded(source.release, *call) and None))
    _alive.append(callbacks)
    return ExpertSource(*(ctypes.cast(callback, ctypes.c_void_p).value for callback in callbacks), 0)
