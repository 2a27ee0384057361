"""One session of ONNX Runtime and one of our libraries of custom ops: what kernels it made, who holds the experts.

The C side is plugins/onnxruntime/session.h. ONNX Runtime takes an op's body, without a word, where a library has no
kernel for it: so the kernels are counted.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import MissingRequirementError
from ..words import listed
from .ort import ort


class ExpertSource(NamedTuple):
    """Has weights of experts in memory while they are read: addresses of a DmoeAcquire, a DmoeRelease, their context.

    In C: a function in Python would wait for the interpreter, beside a busy thread up to sys.getswitchinterval().
    """

    acquire: int
    release: int
    context: int


class LibrarySession:
    """Must live as long as the session of ONNX Runtime that it was registered with."""

    def __init__(self, path: Path, source: ExpertSource | None = None) -> None:
        """Raises MissingRequirementError where library or ONNX Runtime does not take the other."""
        self._path = path
        self._library = load(path, "dmoe_session_create", "dmoe_session_kernels", "dmoe_session_set_products",
                             "dmoe_session_set_experts_layout", "dmoe_session_activations")
        create, kernels = self._library.dmoe_session_create, self._library.dmoe_session_kernels
        choose, order = self._library.dmoe_session_set_products, self._library.dmoe_session_set_experts_layout
        create.restype, create.argtypes = ctypes.c_void_p, [ctypes.c_void_p] * 3
        kernels.restype, kernels.argtypes = ctypes.c_int64, [ctypes.c_void_p, ctypes.c_char_p]
        choose.restype = order.restype = None
        choose.argtypes = order.argtypes = [ctypes.c_void_p, ctypes.c_int32]
        self._address = create(*(source or (None, None, None)))
        assert self._address, f"{path.name} asks no expert source"
        self.register(ort.SessionOptions())

    def register(self, options: Any) -> None:
        """Have the session made with these options use the library; raises MissingRequirementError."""
        options.add_session_config_entry("dmoe.session", str(self._address))
        try:
            options.register_custom_ops_library(str(self._path.resolve()))
        except Exception as error:  # onnxruntime raises its own kinds
            raise _unusable(self._path, error) from error

    def kernels(self, op: str) -> int:
        """Kernels the library has made for nodes of this op, such as "DmoeExperts"."""
        return int(self._library.dmoe_session_kernels(self._address, op.encode()))

    def set_fast(self, fast: bool) -> None:
        """Whether products may round activations to the integers or bfloat16 of faster instructions, from now on."""
        self._library.dmoe_session_set_products(self._address, fast)

    def set_experts_layout(self, layout: int) -> None:
        """In which order quantised experts lie (bundle.md), before a session is made; at first by rows."""
        self._library.dmoe_session_set_experts_layout(self._address, layout)

    @property
    def rebuild(self) -> str:
        """What makes the library anew, as a clause."""
        return _rebuild(self._path)


def load(path: Path, *functions: str) -> ctypes.CDLL:
    """The C side of a library; raises MissingRequirementError where it cannot be loaded, or lacks a function."""
    try:
        _check_whole(path)
        library = ctypes.CDLL(str(path.resolve()))
        for name in functions:
            getattr(library, name)
    except (OSError, ValueError, AttributeError) as error:
        raise _unusable(path, error) from error
    return library


@dataclass(frozen=True)
class Kernels:
    """Whose kernels compute a session's nodes of our ops."""

    missing: list[str]  # ops some of whose nodes run on their bodies, though a library of ours could serve them
    sentence: str  # the end of one, such as "experts, linear layers and attention on our CPU kernels"; may be empty


def kernels_of(session: LibrarySession | None, ops: Mapping[str, int], words: Mapping[str, str], ours: str,
               why_not: str) -> Kernels:
    """Of a graph with so many nodes of each op; `words`: what the ops that the library serves are, by name.

    `ours`: what the library's kernels are called. `why_not`: why there is no session of the library, a clause.
    """
    made = {op: session.kernels(op) if session else 0 for op in words if ops.get(op)}
    missing = [op for op in made if made[op] < ops[op]]
    if session:
        why_not = f"{ours} serve " + " and ".join(f"{made[op]} of {ops[op]} {op} nodes" for op in missing)
    sides = {ours: [words[op] for op in made if op not in missing],
             f"ONNX Runtime's own ops ({why_not})": [words[op] for op in missing]}
    said = [f"{listed(list(dict.fromkeys(what)))} on {side}" for side, what in sides.items() if what]
    return Kernels(missing, ", ".join(said))


def _check_whole(library: Path) -> None:
    """Raises ValueError for a library that was cut short: the loader would end the process."""
    with library.open("rb") as file:
        header = file.read(64)
    if header[:5] == b"\x7fELF\x02" and len(header) == 64:
        at, = struct.unpack_from("<Q", header, 0x28)  # the table of sections, at the end
        size, count = struct.unpack_from("<HH", header, 0x3A)
        if library.stat().st_size < at + size * count:
            raise ValueError("it was cut short")


def _unusable(path: Path, error: Exception) -> MissingRequirementError:
    reason = str(error).splitlines()[0].removeprefix(f"{path.resolve()}: ").rstrip(".")
    return MissingRequirementError(f"ONNX Runtime {ort.__version__} cannot use the kernels in {path} "
                                   f"({reason}); {_rebuild(path)}.")


def _rebuild(path: Path) -> str:
    return f"build them again with `make {'cpu-ops' if path.name == 'libdmoe_cpu.so' else 'ort-ops'}`"
