"""Runs the kernels at small and odd sizes, for compute-sanitizer: numpy, ctypes and the CUDA runtime, no torch.

    compute-sanitizer --tool memcheck --error-exitcode 9 python tests/gpu/sanitizer_driver.py

Outputs and workspace start unwritten here, not poisoned, so that initcheck sees every byte that is read too early.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

if __name__ == "__main__":
    _ROOT = Path(__file__).resolve().parents[2]
    sys.path[:0] = [str(_ROOT), str(_ROOT / "benchmarks"), str(_ROOT / "tests")]

from gpu_common import (
    LIBRARY,
    MODES,
    TYPES,
    ExpertsShapeC,
    KernelLibrary,
    QuantisationC,
    RouteAttributesC,
    require_gpu,
)

from gpu.sanitizer_fused import RUNS

# mode, rows, tokens, E, k, groups, kept, block, softmax: 32-wide and 8-wide blocks, partial blocks, one expert, 1024
ROUTES = [("top_p", 2, 33, 256, 8, 8, 4, 32, 0), ("token", 1, 9, 256, 8, 8, 4, 32, 0),
          ("top_c", 1, 40, 64, 6, 4, 2, 7, 1), ("top_p", 1, 17, 1023, 32, 1, 1, 128, 0),
          ("top_p", 1, 5, 1, 1, 1, 1, 32, 0), ("top_c", 2, 3, 24, 4, 8, 3, 1, 0)]
# N, k, E, H, I', type: every variant of the products (split or not, 32 tokens or more, many tokens), odd tails
EXPERTS = [(32, 8, 40, 256, 64, "fp16"), (13, 3, 2, 2120, 8, "bf16"), (40, 1, 2, 2056, 8, "fp16"),
           (20, 2, 3, 8, 2056, "bf16"), (40, 2, 2, 40, 2072, "fp16"), (70, 2, 5, 136, 72, "bf16"),
           (430, 2, 2, 136, 72, "bf16"), (1030, 1, 3, 8, 8, "fp16"), (1, 1, 1, 8, 8, "bf16"),
           (33, 4, 1024, 24, 8, "fp16"), (9, 8, 2, 24, 16, "fp16")]
# The same and bits: integers in groups of 32, whose last step may be half filled
INTEGERS = [(32, 8, 40, 256, 64, "fp16", 4), (13, 3, 2, 2144, 32, "bf16", 4), (40, 1, 2, 2080, 32, "fp16", 8),
            (20, 2, 3, 32, 2080, "bf16", 8), (40, 2, 2, 96, 2048, "fp16", 4), (70, 2, 5, 160, 96, "bf16", 8),
            (1, 1, 1, 32, 32, "fp16", 8), (33, 4, 64, 96, 32, "fp16", 4), (430, 2, 2, 160, 96, "bf16", 8),
           (150, 1, 2, 96, 160, "fp16", 4)]


class Memory:
    """Exact allocations, without room behind the end, so that one byte too many is an error."""

    def __init__(self, device: Any) -> None:
        self._device, self.stream, self._blocks = device, device.stream(), []

    def empty(self, size: int) -> int:
        """Unwritten bytes."""
        self._blocks.append(self._device.allocate(size))
        return self._blocks[-1]

    def put(self, values: np.ndarray) -> int:
        """A copy on the device."""
        address, staged = self.empty(values.nbytes), self._device.pinned(values.nbytes)
        staged[:] = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        self._device.copy(address, staged.ctypes.data, values.nbytes, self.stream)
        self._device.synchronize(self.stream)
        return address

    def get(self, address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """A copy on the host."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        staged = self._device.pinned(size)
        self._device.copy(staged.ctypes.data, address, size, self.stream)
        self._device.synchronize(self.stream)
        return staged.view(dtype).reshape(shape).copy()

    def free(self) -> None:
        """All of it."""
        self._device.synchronize(self.stream)
        while self._blocks:
            self._device.free(self._blocks.pop())


def run_route(device: Any, library: KernelLibrary, enqueue: Any, case: tuple[Any, ...]) -> None:
    """One routing call; its ids must be experts."""
    mode, rows, tokens, experts, k, groups, kept, block, softmax = case
    rng, memory = np.random.default_rng(tokens), Memory(device)
    positions = np.arange(rows * tokens).reshape(rows, tokens) % (2 * block + 3)
    positions[:, -1:] = -1 if tokens > 1 else 0
    attributes = RouteAttributesC(MODES[mode], block, k, groups, kept, softmax, 1, 2.5)
    inputs = [rng.standard_normal((rows, tokens, experts), np.float32), rng.standard_normal(experts, np.float32),
              positions.astype(np.int64), np.float32([0.6]), np.int64([min(12, experts)]), np.int64([min(9, experts)])]
    addresses = [memory.put(x) for x in inputs]
    addresses += [memory.empty(rows * tokens * n * size) for n, size in ((k, 4), (k, 4), (experts, 1))]
    enqueue(memory.stream, lambda: library.route(attributes, rows, tokens, experts, addresses, memory.stream))
    ids = memory.get(addresses[6], (rows, tokens, k), np.int32)
    weights = memory.get(addresses[7], (rows, tokens, k), np.float32)
    coreset = memory.get(addresses[8], (rows, tokens, experts), np.uint8)
    assert ids.min() >= -1 and ids.max() < experts and (ids >= 0).any() and np.isfinite(weights).all()
    assert set(np.unique(coreset)) <= {0, 1}
    memory.free()


def run_experts(device: Any, library: KernelLibrary, enqueue: Any, case: tuple[Any, ...]) -> None:
    """One experts call; finite, and 0 exactly for a token without experts."""
    tokens, k, experts, hidden, width, kind, *bits = case
    rng, memory = np.random.default_rng(tokens), Memory(device)
    shape = ExpertsShapeC(tokens, k, experts, hidden, width, TYPES[kind])
    ids = rng.integers(-1, experts + 1, (tokens, k)).astype(np.int32)  # −1 and one too many are nobody
    ids[0] = 0
    if tokens > 1:
        ids[-1] = -1

    def words(*size: int, scale: float = 1) -> np.ndarray:
        values = (rng.uniform(0.05, 0.2, size) * scale).astype(np.float32)
        return values.astype(np.float16).view(np.uint16) if kind == "fp16" else (
            values.view(np.uint32) >> 16).astype(np.uint16)

    slabs = (2 * width, hidden), (hidden, width)
    weights = [words(experts, *slab) for slab in slabs]
    if bits:
        # Random, so they are random in fragment order, too.
        weights = [rng.integers(0, 256, (experts, rows, depth * bits[0] // 8), np.uint8) for rows, depth in slabs]
    addresses = [memory.put(x) for x in (words(tokens, hidden), ids, rng.standard_normal((tokens, k), np.float32),
                                         *weights)]
    addresses += [memory.empty(tokens * hidden * 2), memory.empty(library.workspace_bytes(shape))]
    if bits:
        scales = [memory.put(words(experts, rows, depth // 32, scale=2.0 ** -bits[0])) for rows, depth in slabs]
        quantisation = QuantisationC(bits[0], 32, *scales)
        enqueue(memory.stream, lambda: library.experts_quantised(shape, quantisation, addresses, memory.stream))
    else:
        enqueue(memory.stream, lambda: library.experts(shape, addresses, memory.stream))
    mixed = memory.get(addresses[5], (tokens, hidden), np.uint16)
    exponent = 0x7C00 if kind == "fp16" else 0x7F80
    assert ((mixed & exponent) != exponent).all(), "not finite"
    assert mixed[0].any() and (tokens == 1 or not (mixed[-1] & 0x7FFF).any())
    memory.free()


def main(device: Any, library: KernelLibrary, enqueue: Any) -> int:
    """All cases; how many."""
    for case in ROUTES:
        run_route(device, library, enqueue, case)
    for case in EXPERTS + INTEGERS:
        run_experts(device, library, enqueue, case)
    fused = [(run, case) for run, cases in RUNS for case in cases]
    for run, case in fused:
        memory = Memory(device)
        run(memory, library, enqueue, case)
        memory.free()
    return len(ROUTES) + len(EXPERTS) + len(INTEGERS) + len(fused)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", type=Path, default=LIBRARY)
    chosen = parser.parse_args()
    require_gpu()
    from dmoe_export.runtime.gpu.device import CudaDevice

    print(f"{main(CudaDevice.open(), KernelLibrary(chosen.library), lambda stream, work: work())} calls were fine")
