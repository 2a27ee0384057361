"""The vocabulary head alone, against a device copy of the same run, and ranking its logits. Part of gpu_kernels.py."""

from __future__ import annotations

import ctypes
from functools import partial
from typing import Any

import numpy as np
from gpu_common import TYPES, KernelLibrary, time_calls
from gpu_memory import Memory
from gpu_outcome import against, predicted_head

from dmoe_export.runtime.gpu.candidates import CandidateKernel, ShapeC

PLACES = 32  # of which logits are ranked


class HeadShapeC(ctypes.Structure):
    """DmoeHeadShape."""

    _fields_ = [(name, ctypes.c_int32) for name in ("rows", "tokens", "wanted", "kept", "hidden", "vocabulary", "type")]


class HeadAttributesC(ctypes.Structure):
    """DmoeHeadAttributes."""

    _fields_ = [("eps", ctypes.c_float), ("mask_id", ctypes.c_int32)]


def measure_head(device: Any, stream: int, library: KernelLibrary, kind: str, size: tuple[int, int], rows: int,
                 copy_rate: float) -> dict[str, Any]:
    """`rows` rows of 32 wanted tokens, logits kept of one place each; `size`: vocabulary and hidden size."""
    (vocabulary, hidden), tokens = size, 32
    shape = HeadShapeC(rows, tokens, tokens, 1, hidden, vocabulary, TYPES[kind])
    attributes, wanted = HeadAttributesC(1e-6, vocabulary - 1), rows * tokens
    with Memory(device, stream) as memory:
        places = np.tile(np.arange(tokens, dtype=np.int64), (rows, 1))
        inputs = [memory.random_halfs(count, kind, scale) for count, scale in (
            (wanted * hidden, 1.0), (hidden, 1.0), (vocabulary * hidden, hidden**-0.5))]
        outputs = [memory.empty(count) for count in (8 * wanted, 4 * wanted, 4 * rows * vocabulary,
                                                     library.head_workspace_bytes(shape))]
        addresses = [*inputs, memory.put(places), *outputs]
        timing = time_calls(device, stream, [lambda s: library.head(shape, attributes, addresses, s)])
    rate = 2 * vocabulary * hidden / timing["ms"] * 1e3
    return {"type": kind, "vocabulary": vocabulary, "hidden": hidden, "tokens": wanted, **timing,
            "bytes_per_second": rate, "of_copy": rate / copy_rate,
            **against(1e3 * timing["ms"], predicted_head(device.name, vocabulary, hidden, wanted))}


def measure_candidates(device: Any, stream: int, kernel: CandidateKernel, vocabulary: int,
                       count: int) -> dict[str, Any]:
    """The `count` best of each place's logits, of four sets in turn: more than the L2 cache holds."""
    shape = ShapeC(1, PLACES, PLACES, vocabulary, count)
    with Memory(device, stream) as memory:
        sizes = (4 * PLACES * count, 4 * PLACES * count, kernel.workspace_bytes(shape))
        results = [memory.empty(size) for size in sizes]
        calls = [partial(kernel.enqueue, shape, vocabulary - 1, memory.random_floats(PLACES * vocabulary), *results)
                 for _ in range(4)]
        timing = time_calls(device, stream, calls)
    return {"vocabulary": vocabulary, "tokens": PLACES, "candidates": count, **timing}
