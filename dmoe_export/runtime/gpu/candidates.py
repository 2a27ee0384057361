"""What the host gets of a forward's logits: the best few of each place, ranked on the device, or all of them.

The kernel (plugins/kernels/candidates.cuh) reads the logits of any graph and engine, so neither knows of candidates,
and a step that draws nothing does nothing for them. Not run on a GPU yet; tests run it on the emulated thread block.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ...errors import MissingRequirementError, as_clause
from ...ops import plugin_library
from ..candidates import Candidates, best_of
from . import custom_ops
from .call import Layout, Tensor
from .device import DeviceError
from .staging import Staging

_log = logging.getLogger(__name__)
Taken = tuple[NDArray[Any] | None, Candidates | None]
"""Logits [B, M, V] and candidates, each where it is wanted."""


class ShapeC(ctypes.Structure):
    """`DmoeCandidatesShape` of plugins/kernels/dmoe_kernels.h."""

    _fields_ = [(name, ctypes.c_int32) for name in ("rows", "wanted", "kept", "vocabulary", "candidates")]


class CandidateKernel:
    """The C functions, of a library of our CUDA kernels: TensorRT's plugins or the custom ops."""

    def __init__(self, path: Path) -> None:
        """Raises MissingRequirementError where the library cannot be loaded, or is older than the kernel."""
        try:
            library = ctypes.CDLL(str(path.resolve()))
            self._run, self._bytes = library.dmoe_candidates, library.dmoe_candidates_workspace_bytes
            self._said = library.dmoe_error_string
        except (OSError, AttributeError) as error:
            target = "plugins" if "plugins" in path.name else "ort-ops"
            raise MissingRequirementError(f"{path} has no kernel for candidates ({error}); build it again with "
                                          f"`make {target}`.") from None
        self._run.argtypes = [ctypes.c_void_p, ctypes.c_int32, *[ctypes.c_void_p] * 5]
        self._bytes.restype, self._bytes.argtypes = ctypes.c_int64, [ctypes.c_void_p]
        self._said.restype = ctypes.c_char_p

    def workspace_bytes(self, shape: ShapeC) -> int:
        """What `enqueue` needs; raises DeviceError for sizes that the kernel does not take."""
        size = int(self._bytes(ctypes.byref(shape)))
        self._check(min(size, 0))
        return size

    def enqueue(self, shape: ShapeC, mask_id: int, logits: int, token_ids: int, values: int, workspace: int,
                stream: int) -> None:
        """`dmoe_candidates` on these addresses; raises DeviceError."""
        self._check(self._run(ctypes.byref(shape), mask_id, logits, token_ids, values, workspace, stream))

    def _check(self, code: int) -> None:
        if code:
            raise DeviceError(f"The kernel for candidates failed: {self._said(code).decode()}.")


def installed() -> Path | None:
    """A library with the kernel, whichever there is: the custom ops first, as loading them registers nothing."""
    places = (custom_ops.INSTALLED, plugin_library.INSTALLED / plugin_library.LIBRARY)
    return next((path for path in places if path.is_file()), None)


class LogitsTaker:
    """Brings to the host what it wants of logits on the device; where no kernel ranks, the host does: the same bits."""

    def __init__(self, staging: Staging, stream: int, mask_id: int, library: Path | None) -> None:
        """`library` with the kernel, opened when candidates are first wanted; None: the host ranks."""
        self._staging, self._stream, self._mask_id = staging, stream, mask_id
        self._library = library
        self._kernel: CandidateKernel | None = None
        self._opened = False

    def take(self, logits: Tensor, wanted: int, want_logits: bool, candidates: int) -> Callable[[], Taken]:
        """Enqueue it for the first `wanted` places of each row of logits [B, L, V]; ask once the stream is done.

        The arrays are the caller's. Raises DeviceError when the device fails.
        """
        kernel = self._open() if candidates else None
        ranked = self._rank(kernel, logits, wanted, candidates) if kernel else None
        fetched = None
        if want_logits or (candidates and not kernel):
            rows, kept, vocabulary = logits.shape
            fetched = self._staging.fetch_logits(logits.address, (rows, kept, vocabulary), wanted)

        def taken() -> Taken:
            found = ranked() if ranked else None
            if fetched is not None and candidates and not kernel:
                found = best_of(fetched, self._mask_id, candidates)
            return fetched.copy() if fetched is not None and want_logits else None, found

        return taken

    def _rank(self, kernel: CandidateKernel, logits: Tensor, wanted: int, count: int) -> Callable[[], Candidates]:
        rows, kept, vocabulary = logits.shape
        shape = ShapeC(rows, wanted, kept, vocabulary, count)
        layout = Layout([("token_ids", (rows, wanted, count), "int32"), ("logits", (rows, wanted, count), "fp32")])
        found = layout.tensors(self._staging.buffer("candidates", layout.size))
        workspace = self._staging.buffer("candidates' workspace", kernel.workspace_bytes(shape))
        kernel.enqueue(shape, self._mask_id, logits.address, found["token_ids"].address, found["logits"].address,
                       workspace, self._stream)
        fetched = self._staging.fetch(layout, found["token_ids"].address, "candidates")
        masks = self._staging.fetch_column(logits.address, (rows, kept, vocabulary), wanted, self._mask_id)
        return lambda: Candidates(layout.view(fetched, "token_ids").copy(), layout.view(fetched, "logits").copy(),
                                  masks.copy())

    def _open(self) -> CandidateKernel | None:
        if not self._opened:
            self._opened = True
            why_not = "no library of CUDA kernels is installed, or it is off"
            try:
                self._kernel = CandidateKernel(self._library) if self._library else None
            except MissingRequirementError as error:
                why_not = as_clause(error)
            if self._kernel is None:
                _log.warning("Steps that draw with top_k, or edit, send all logits to the host, which ranks them: %s; "
                             "`make ort-ops` builds what ranks them on the GPU.", why_not)
        return self._kernel
