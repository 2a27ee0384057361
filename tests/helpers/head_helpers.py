"""DmoeHead on the emulated thread block, and what it should give."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import torch
from kernel_helpers import FP16, Output, _input, check, from_half, library, pointer, to_half

from dmoe_export.ops.head.eager import head

EPS = 1e-5


class HeadShapeC(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in ("rows", "tokens", "wanted", "kept", "hidden", "vocabulary", "type")]


class HeadAttributesC(ctypes.Structure):
    _fields_ = [("eps", ctypes.c_float), ("mask_id", ctypes.c_int32)]


@dataclass
class HeadCase:
    """Raw words of hidden [B·T, H], norm [H] and weight [V, H]; int64 logit_rows [B, M]."""

    kind: int
    hidden: np.ndarray
    norm: np.ndarray
    weight: np.ndarray
    logit_rows: np.ndarray
    kept: int
    mask_id: int

    @property
    def shape(self) -> HeadShapeC:
        rows, wanted = self.logit_rows.shape
        return HeadShapeC(rows, len(self.hidden) // rows if rows else 0, wanted, self.kept, self.hidden.shape[1],
                          len(self.weight), self.kind)


def make_case(kind, rows=1, tokens=8, wanted=4, kept=None, hidden=64, vocabulary=300, mask_id=7, seed=0) -> HeadCase:
    rng = np.random.default_rng(seed)
    return HeadCase(kind, to_half(rng.normal(size=(rows * tokens, hidden)), kind),
                    to_half(rng.uniform(0.5, 1.5, hidden), kind),
                    to_half(rng.normal(size=(vocabulary, hidden)) * 2 / np.sqrt(hidden), kind),
                    rng.integers(-1, tokens, (rows, wanted)), wanted if kept is None else kept, mask_id)


def kernel_head(case: HeadCase) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids [B, M], confidence [B, M] and logits [B, L, V]."""
    shape, attributes = case.shape, HeadAttributesC(EPS, case.mask_id)
    size = library().dmoe_head_workspace_bytes(ctypes.byref(shape))
    check(min(size, 0))
    inputs = [_input(part, np.uint16) for part in (case.hidden, case.norm, case.weight)]
    inputs.append(_input(case.logit_rows, np.int64))
    outputs = [Output(case.logit_rows.shape, np.int64), Output(case.logit_rows.shape, np.float32),
               Output((len(case.logit_rows), case.kept, len(case.weight)), np.float32)]
    workspace = Output(size, np.uint8)
    workspace.array[:] = 0x7f  # NaN halfs, huge keys and floats: what is read before it is written shows
    check(library().dmoe_head(ctypes.byref(shape), ctypes.byref(attributes), *map(pointer, inputs),
                              *[pointer(output.array) for output in outputs], pointer(workspace.array), None))
    workspace.checked()
    return tuple(output.checked() for output in outputs)


def eager_head(case: HeadCase) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The eager op in float32, whose norm is not rounded."""
    values = [torch.from_numpy(from_half(part, case.kind)) for part in (case.hidden, case.norm, case.weight)]
    places = torch.from_numpy(np.minimum(case.logit_rows, case.shape.tokens - 1))
    results = head(*values, places, torch.zeros(case.kept, dtype=torch.int64), eps=EPS, mask_id=case.mask_id)
    return tuple(result.numpy() for result in results)


def reference_logits(case: HeadCase) -> tuple[np.ndarray, np.ndarray]:
    """Logits [B, M, V] of the rounded norm in float64, and the largest error that another order of float32 sums allows.

    A normed value that float32 arithmetic may round to either of two halfs adds their distance.
    """
    hidden, norm, weight = (from_half(part, case.kind).astype(np.float64)
                            for part in (case.hidden, case.norm, case.weight))
    rows = case.logit_rows.shape[0]
    tokens = np.arange(rows)[:, None] * case.shape.tokens + np.clip(case.logit_rows, 0, case.shape.tokens - 1)
    x = hidden[tokens]
    exact = x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * norm
    low, middle, high = (from_half(to_half(exact * factor, case.kind), case.kind).astype(np.float64)
                         for factor in (1 - 1e-6, 1, 1 + 1e-6))
    unsure, tiny = np.abs(high - low), 2.0**-25 if case.kind == FP16 else 0.0
    size = np.abs(weight).T
    return middle @ weight.T, (unsure + tiny) @ size + 2e-6 * (np.abs(middle) @ size)


def _allowed(logits: np.ndarray, mask_id: int) -> np.ndarray:
    """Logits with the mask token's at minus infinity."""
    return np.where(np.arange(logits.shape[-1]) == mask_id, -np.inf, logits)


def assert_head(case: HeadCase, results: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    """Logits within their bound; ids and confidence those of the logits, where all are there."""
    token_ids, confidence, logits = results
    want, error = reference_logits(case)
    assert (np.abs(logits - want[:, :case.kept]) <= error[:, :case.kept]).all()
    options, size = _allowed(want, case.mask_id), error.max()
    best = options.max(-1)
    chosen = np.take_along_axis(options, token_ids[..., None], -1)[..., 0]
    assert (best - chosen <= 2 * size).all()
    # Every exponent may be off by two errors; expf and sums of float32 by 1e-5 in all.
    np.testing.assert_allclose(confidence, 1 / np.exp(options - best[..., None]).sum(-1),
                               rtol=np.expm1(2 * size) + 1e-5)
    own = _allowed(logits.astype(np.float64), case.mask_id)
    np.testing.assert_array_equal(token_ids[:, :case.kept], own.argmax(-1))  # the first of equal ones, as ours
    own -= own.max(-1, keepdims=True)
    np.testing.assert_allclose(confidence[:, :case.kept], 1 / np.exp(own).sum(-1), rtol=1e-5)
