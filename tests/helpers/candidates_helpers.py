"""dmoe_candidates on the emulated thread block, and logits to rank."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
from builds import build
from kernel_helpers import Output, _input, check, library, pointer

from dmoe_export.runtime.candidates import Candidates, mask_logits_of
from dmoe_export.runtime.gpu.candidates import ShapeC


def kernel_candidates(logits: np.ndarray, mask_id: int, count: int, wanted: int | None = None) -> Candidates:
    """Of the first `wanted` places (default: all) of logits [B, L, V]."""
    rows, kept, vocabulary = logits.shape
    wanted = kept if wanted is None else wanted
    shape = ShapeC(rows, wanted, kept, vocabulary, count)
    size = library().dmoe_candidates_workspace_bytes(ctypes.byref(shape))
    check(min(size, 0))
    outputs = Output((rows, wanted, count), np.int32), Output((rows, wanted, count), np.float32)
    workspace = Output(size, np.uint8)
    given = _input(logits, np.float32)
    check(library().dmoe_candidates(ctypes.byref(shape), mask_id, pointer(given),
                                    *[pointer(output.array) for output in outputs], pointer(workspace.array), None))
    workspace.checked()
    ids, values = (output.checked() for output in outputs)
    return Candidates(ids, values, mask_logits_of(logits[:, :wanted], mask_id))  # the kernel ranks, and no more


def emulated_ops() -> Path:
    """The custom ops' library whose kernels are emulated."""
    return build("emulation") / "libdmoe_onnxruntime_cpu.so"


def draw(rng: np.random.Generator, shape: tuple[int, int, int], kind: str) -> np.ndarray:
    """Logits of a kind: `spread`, `near` each other, `few` values, all `equal`, `special` numbers among them."""
    logits = rng.normal(0, 4, shape).astype(np.float32)
    if kind == "near":
        logits = (1 + rng.integers(0, 50, shape) * 2.0**-23).astype(np.float32)
    elif kind == "few":
        logits = rng.integers(-2, 2, shape).astype(np.float32)
    elif kind == "equal":
        logits[:] = logits[0, 0, 0]
    elif kind == "special":
        some = rng.random(shape)
        for bound, value in ((0.2, np.nan), (0.15, -np.inf), (0.1, np.inf), (0.05, 0.0), (0.02, -0.0)):
            logits[some < bound] = value
    return logits
