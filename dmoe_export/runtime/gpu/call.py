"""One forward as an executor sees it: sizes, and tensors by name at addresses."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ...description import RUNTIME_SETTINGS, Precision, RoutingDescription
from ..backend import Limits
from .memory import ALIGNMENT

ITEMSIZES = {"fp32": 4, "fp16": 2, "bf16": 2, "int64": 8, "int32": 4, "bool": 1}


class Sizes(NamedTuple):
    """Symbolic dimensions of the graph: B, T, S, M."""

    batch: int
    tokens: int
    past: int
    rows: int


@dataclass(frozen=True)
class Tensor:
    """A bound tensor; `dtype`: a key of ITEMSIZES; `host`: the same content in host memory, for inputs."""

    address: int
    shape: tuple[int, ...]
    dtype: str
    host: int | None = None


@dataclass(frozen=True)
class Call:
    """All tensors of one forward, by the names of the graph (docs/bundle.md)."""

    sizes: Sizes
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


class Launcher(Protocol):
    """A prepared call whose state nothing else touches, so that it can be recorded."""

    host_reads: bool  # whether recorded copies may read host memory, as memory of its own that stays

    def __call__(self, stream: int) -> None:
        """Enqueue it."""
        ...

    def capturable(self, stream: int) -> bool:
        """Whether it may be recorded now."""
        ...


class Executor(Protocol):
    """What runs calls on a stream: TensorRT, or ONNX Runtime."""

    precision: Precision  # of keys and values
    limits: Limits | None
    era: int  # recorded calls of an earlier one must not be replayed

    def fit(self, least: Sizes, rows_step: int) -> Sizes:
        """The sizes to run `least` as: T and M may be padded up, M to a multiple of `rows_step` if there is room.

        Raises RequestError past a limit.
        """
        ...

    def execute(self, call: Call, stream: int) -> None:
        """Enqueue a call."""
        ...

    def isolate(self, call: Call, stream: int) -> Launcher | None:
        """A launcher for this call; None where calls cannot be recorded."""
        ...

    def close(self) -> None:
        """Let go of session or engine and its memory, once; no call may follow."""
        ...


class Settings:
    """Routing settings that a graph takes as inputs of one number each, with the bundle's as defaults."""

    def __init__(self, routing: RoutingDescription) -> None:
        self._defaults = {name: getattr(routing, name) for name in RUNTIME_SETTINGS[routing.mode]}
        self.layout = [(name, (1,), "fp32" if name == "top_p" else "int64") for name in self._defaults]

    def values(self, changed: Mapping[str, float | int]) -> dict[str, tuple[float | int, int]]:
        """As `Staging.send` takes them."""
        return {name: (changed.get(name, default), 0) for name, default in self._defaults.items()}


class Layout:
    """Arrays packed into one block of bytes, each at a multiple of 256, so that one copy moves all."""

    def __init__(self, arrays: Iterable[tuple[str, tuple[int, ...], str]]) -> None:
        """Of (name, shape, dtype)."""
        self._places: dict[str, tuple[int, tuple[int, ...], str]] = {}
        offset = 0
        for name, shape, dtype in arrays:
            self._places[name] = (offset, shape, dtype)
            offset += round_up(math.prod(shape) * ITEMSIZES[dtype], ALIGNMENT)
        self.size = offset

    @property
    def names(self) -> list[str]:
        """Of the arrays, in order."""
        return list(self._places)

    def view(self, block: NDArray[np.uint8], name: str) -> NDArray[Any]:
        """One array in a host copy of the block."""
        offset, shape, dtype = self._places[name]
        count = math.prod(shape) * ITEMSIZES[dtype]
        return block[offset:offset + count].view("float32" if dtype == "fp32" else dtype).reshape(shape)

    def tensors(self, address: int, host: int | None = None) -> dict[str, Tensor]:
        """All arrays of a block at `address` (and a host copy of it)."""
        return {name: Tensor(address + offset, shape, dtype, None if host is None else host + offset)
                for name, (offset, shape, dtype) in self._places.items()}


def round_up(value: int, step: int) -> int:
    """Least multiple of `step` that is not below `value`."""
    return -(-value // step) * step
