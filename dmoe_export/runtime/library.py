"""One session of ONNX Runtime and one of our libraries of custom ops: what kernels it made, who holds the experts.

The C side is plugins/onnxruntime/session.h.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import MissingRequirementError
from .ort import ort

Experts = NDArray[np.int32]

_ACQUIRE = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32)
_RELEASE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32)


class ExpertSource(Protocol):
    """Has weights of experts in memory while they are read; the address of its gate_up tensor names a layer."""

    def acquire(self, gate_up: int, experts: Experts) -> int:
        """Hold some of these expert ids, at least one: reorder `experts` so that they come first; how many they are."""
        ...

    def release(self, gate_up: int, experts: Experts) -> None:
        """What was acquired is no longer read."""
        ...


class LibrarySession:
    """Must live as long as the session of ONNX Runtime that it was registered with."""

    def __init__(self, path: Path, source: ExpertSource | None = None) -> None:
        """Raises MissingRequirementError where the library cannot be loaded, or knows no sessions."""
        self._path, self._failures = path, list[BaseException]()
        try:
            _check_whole(path)
            self._library = ctypes.CDLL(str(path.resolve()))
            create, kernels = self._library.dmoe_session_create, self._library.dmoe_session_kernels
        except (OSError, ValueError, AttributeError) as error:
            raise self._unusable(error) from error
        create.restype, create.argtypes = ctypes.c_void_p, [ctypes.c_void_p] * 3
        kernels.restype, kernels.argtypes = ctypes.c_int64, [ctypes.c_void_p, ctypes.c_char_p]
        self._callbacks = _callbacks(source, self._failures) if source else (None, None)
        self._address = create(*(ctypes.cast(callback or 0, ctypes.c_void_p) for callback in self._callbacks), None)
        assert self._address, f"{path.name} asks no expert source"

    def register(self, options: Any) -> None:
        """Have the session made with these options use the library; raises MissingRequirementError."""
        options.add_session_config_entry("dmoe.session", str(self._address))
        try:
            options.register_custom_ops_library(str(self._path.resolve()))
        except Exception as error:  # onnxruntime raises its own kinds
            raise self._unusable(error) from error

    def kernels(self, op: str) -> int:
        """Kernels the library has made for nodes of this op ("DmoeExperts", "DmoeLinear", "DmoeBlockRoute")."""
        return int(self._library.dmoe_session_kernels(self._address, op.encode()))

    def raise_failure(self) -> None:
        """Raise what the source raised in a run, if it did."""
        if self._failures:
            raise self._failures.pop(0)

    def _unusable(self, error: Exception) -> MissingRequirementError:
        target = "cpu-ops" if self._path.name == "libdmoe_cpu.so" else "ort-ops"
        reason = str(error).splitlines()[0].removeprefix(f"{self._path.resolve()}: ").rstrip(".")
        return MissingRequirementError(f"ONNX Runtime {ort.__version__} cannot use the kernels in {self._path} "
                                       f"({reason}); build them again with `make {target}`.")


def _callbacks(source: ExpertSource, failures: list[BaseException]) -> tuple[Any, Any]:
    """C functions that call the source; what it raises is kept, because C has no exceptions."""
    def guarded(work: Callable[[int, Experts], int | None], gate_up: int, experts: int, count: int) -> int:
        memory: Any = (ctypes.c_int32 * count).from_address(experts)
        ids = np.frombuffer(memory, np.int32)
        try:
            return work(gate_up, ids) or 0
        except BaseException as error:
            failures.append(error)
            return -1

    def acquire(_: int | None, gate_up: int, experts: int, count: int) -> int:
        return guarded(source.acquire, gate_up, experts, count)

    def release(_: int | None, gate_up: int, experts: int, count: int) -> None:
        guarded(source.release, gate_up, experts, count)

    return _ACQUIRE(acquire), _RELEASE(release)


def _check_whole(library: Path) -> None:
    """Raises ValueError for a library that was cut short: the loader would end the process."""
    with library.open("rb") as file:
        header = file.read(64)
    if header[:5] == b"\x7fELF\x02" and len(header) == 64:
        at, = struct.unpack_from("<Q", header, 0x28)  # the table of sections, at the end
        size, count = struct.unpack_from("<HH", header, 0x3A)
        if library.stat().st_size < at + size * count:
            raise ValueError("it was cut short")
