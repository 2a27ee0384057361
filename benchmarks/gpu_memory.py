"""Device memory of GPU benchmarks."""

from __future__ import annotations

from typing import Any

import numpy as np

_PATTERN = 4_194_301  # random numbers that are drawn, then repeated: a prime, so that no two experts are alike


class Memory:
    """Device memory for one part of the benchmark, freed at its end; filled with random numbers, never with zeros."""

    def __init__(self, device: Any, stream: int) -> None:
        self.device, self.stream, self._blocks = device, stream, []
        self._staged = device.pinned(16 << 20)
        self._rng = np.random.default_rng(0)
        self._patterns: dict[int, np.ndarray] = {}

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *_: object) -> None:
        self.device.synchronize(self.stream)
        while self._blocks:
            self.device.free(self._blocks.pop())

    def empty(self, size: int) -> int:
        """Unwritten."""
        self._blocks.append(self.device.allocate(size))
        return self._blocks[-1]

    def put(self, values: np.ndarray, address: int | None = None) -> int:
        """A copy of an array of at most 16 MiB."""
        address = self.empty(values.nbytes) if address is None else address
        self._staged[:values.nbytes] = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        self.device.copy(address, self._staged.ctypes.data, values.nbytes, self.stream)
        self.device.synchronize(self.stream)
        return address

    def get(self, address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """A copy on the host, of at most 16 MiB."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self.device.copy(self._staged.ctypes.data, address, size, self.stream)
        self.device.synchronize(self.stream)
        return self._staged[:size].view(dtype).reshape(shape).copy()

    def random_halfs(self, count: int, kind: str, scale: float) -> int:
        """`count` 16-bit numbers around 0: a pattern of some 4 Mi, repeated."""
        values = self._rng.standard_normal(min(count, _PATTERN), np.float32) * np.float32(scale)
        words = values.astype(np.float16).view(np.uint16) if kind == "fp16" else (
            values.view(np.uint32) >> 16).astype(np.uint16)
        return self._repeated(words.view(np.uint8), 2 * count)

    def random_floats(self, count: int) -> int:
        """`count` float32 numbers, likewise."""
        return self._repeated(self._rng.standard_normal(min(count, _PATTERN), np.float32).view(np.uint8), 4 * count)

    def random_bytes(self, count: int) -> int:
        """`count` integers of 8 bits, or twice as many of 4."""
        return self._repeated(self._rng.integers(0, 256, min(count, _PATTERN), np.uint8), count)

    def _repeated(self, pattern: np.ndarray, size: int) -> int:
        address = self.put(pattern, self.empty(size))
        self._patterns[address] = pattern
        for start in range(len(pattern), size, len(pattern)):
            self.device.copy(address + start, address, min(len(pattern), size - start), self.stream)
        self.device.synchronize(self.stream)
        return address

    def written(self, address: int, offset: int, size: int) -> np.ndarray:
        """Bytes that one of these put at `offset` of what they returned, from the host's memory."""
        return np.take(self._patterns[address], np.arange(offset, offset + size), mode="wrap")
