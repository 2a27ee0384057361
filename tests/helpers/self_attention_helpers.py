"""Cases of `DmoeSelfAttention` for the kernels: made, run on the emulated thread block, and what error is allowed."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace

import numpy as np
import torch
from kernel_helpers import FP16, Output, check, from_half, library, pointer, to_half

from dmoe_export.ops.attention.eager import attention
from dmoe_export.ops.self_attention.eager import attention_bias, self_attention


class ShapeC(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in ("rows", "tokens", "past", "heads", "kv_heads", "head_dim",
                                                    "rotary_dim", "block_length", "type")] + [("eps", ctypes.c_float)]


@dataclass(frozen=True)
class Sizes:
    rows: int = 1
    tokens: int = 32
    past: int = 128
    heads: int = 4
    kv_heads: int = 1
    head_dim: int = 64
    rotary_dim: int = 32
    block_length: int = 32

    def c(self, kind: int, eps: float = 1e-6) -> ShapeC:
        return ShapeC(self.rows, self.tokens, self.past, self.heads, self.kv_heads, self.head_dim, self.rotary_dim,
                      self.block_length, kind, eps)


@dataclass(frozen=True)
class Case:
    """Raw words of qkv, past_key, past_value and norms (None: without); float32 angles, int64 positions."""

    kind: int
    sizes: Sizes
    qkv: np.ndarray
    cos: np.ndarray
    sin: np.ndarray
    position_ids: np.ndarray
    past_positions: np.ndarray
    past_key: np.ndarray
    past_value: np.ndarray
    q_norm: np.ndarray | None
    k_norm: np.ndarray | None

    def inputs(self) -> list[np.ndarray | None]:
        """In the order of the C function."""
        return [self.qkv, self.cos, self.sin, self.position_ids, self.past_positions, self.past_key, self.past_value,
                self.q_norm, self.k_norm]

    def with_positions(self, new: np.ndarray, past: np.ndarray) -> Case:
        return replace(self, position_ids=np.int64(new), past_positions=np.int64(past))


def make_case(kind: int, sizes: Sizes, seed: int = 0, norms: bool = True, spread: float = 1.0) -> Case:
    """A cache of places in order with a tenth free, then the new block; `spread` scales the scores."""
    rng, s = np.random.default_rng(seed), sizes
    past = np.tile(np.arange(s.past), (s.rows, 1))
    past[rng.random(past.shape) < 0.1] = -1
    new = np.tile(s.past + np.arange(s.tokens), (s.rows, 1))
    angles = rng.normal(size=(s.rows, s.tokens, 1, s.rotary_dim // 2)) * 3
    width = (s.heads + 2 * s.kv_heads) * s.head_dim
    cache = (s.rows, s.kv_heads, s.past, s.head_dim)

    def norm(scale: float) -> np.ndarray | None:
        return to_half(scale * (1 + 0.2 * rng.normal(size=s.head_dim)), kind) if norms else None

    return Case(kind, s, to_half(rng.normal(size=(s.rows * s.tokens, width)) * (3 if norms else 1), kind),
                np.float32(np.cos(angles)), np.float32(np.sin(angles)), new.astype(np.int64), past.astype(np.int64),
                to_half(rng.normal(size=cache), kind), to_half(rng.normal(size=cache), kind), norm(spread), norm(1.0))


def run(case: Case, poison: int = 0x7f) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Raw words of mixed, key and value. Fresh memory is full of `poison`."""
    shape, s = case.sizes.c(case.kind), case.sizes
    keep = [x if x is None else np.array(x, order="C") for x in case.inputs()]
    size = library().dmoe_self_attention_workspace_bytes(ctypes.byref(shape))
    check(min(size, 0))
    workspace = Output((size,), np.uint8)
    workspace.array[:] = poison
    cache = (s.rows, s.kv_heads, s.tokens, s.head_dim)
    outputs = [Output((s.rows * s.tokens, s.heads * s.head_dim), np.uint16), Output(cache, np.uint16),
               Output(cache, np.uint16)]
    check(library().dmoe_self_attention(ctypes.byref(shape), *map(pointer, keep), *(pointer(o.array) for o in outputs),
                                        pointer(workspace.array), None))
    workspace.checked()
    mixed, key, value = (o.checked() for o in outputs)
    return mixed, key, value


def eager(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The op in float32 on the same 16-bit values."""
    halfs = ("qkv", "past_key", "past_value", "q_norm", "k_norm")
    names = (*halfs, "cos", "sin", "position_ids", "past_positions")
    values = {name: getattr(case, name) for name in names if getattr(case, name) is not None}
    tensors = {name: torch.from_numpy(from_half(x, case.kind) if name in halfs else x) for name, x in values.items()}
    found = self_attention(**tensors, block_length=case.sizes.block_length, eps=case.sizes.c(0).eps)
    mixed, key, value = (x.numpy() for x in found)
    return mixed, key, value


def unit_of(kind: int) -> tuple[float, float]:
    """The largest relative error of rounding to 16 bits, and the largest absolute one of small values."""
    return (2.0**-11, 2.0**-25) if kind == FP16 else (2.0**-8, 2.0**-134)


def seen(case: Case) -> np.ndarray:
    """[B, T, S + T]: whether a token sees a place."""
    places = np.concatenate([case.past_positions, case.position_ids], axis=1)
    visible = np.broadcast_to((places >= 0)[:, None], (*case.position_ids.shape, places.shape[1]))
    if length := case.sizes.block_length:
        block, own = np.maximum(places, 0) // length, np.maximum(case.position_ids, 0) // length
        visible = visible & (block[:, None] <= own[:, :, None])
    return visible


def mixture(case: Case, key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`mixed` by the eager op of q rounded to 16 bits and `key` as the kernel rounded it; the largest error allowed.

    What is left: the weights exp(score − largest) are rounded to 16 bits (fp16: by at least 2^−25) while their sum, at
    least 1, is not; the result is rounded; and q itself may be rounded to the other side where float32 errors decide. A
    score off by δ makes weights off by a factor of at most e^2δ.
    """
    s, (unit, tiny) = case.sizes, unit_of(case.kind)
    keys = np.concatenate([from_half(case.past_key, case.kind), key], axis=2).astype(np.float64)  # [B, Hkv, S + T, D]
    sizes = np.abs(np.concatenate([from_half(x, case.kind) for x in (case.past_value, _values(case))], axis=2))
    exact = _queries(case)
    sides = [from_half(to_half(exact + by * np.abs(exact).max(), case.kind), case.kind) for by in (-2e-7, 0, 2e-7)]
    shape = (s.rows, s.tokens, s.kv_heads, -1, s.head_dim)
    q, unsure = sides[1].reshape(shape), (sides[2] - sides[0]).reshape(shape)
    visible = seen(case)[:, :, None, None]
    scores = np.where(visible, np.einsum("bthsd,bhkd->bthsk", q.astype(np.float64), keys), -np.inf)
    slack = np.einsum("bthsd,bhkd->bthsk", unsure + 2e-6 * np.abs(q), np.abs(keys))
    delta = np.where(visible, slack, 0).max(axis=-1, keepdims=True)
    peak = scores.max(axis=-1, keepdims=True)
    weights = np.where(visible, np.exp(scores - np.where(np.isinf(peak), 0, peak)), 0)
    total = np.maximum(weights.sum(axis=-1, keepdims=True), 1e-30)
    want = _eager_mixture(case, q, key).reshape(shape)
    weighed = np.einsum("bthsk,bhkd->bthsd", weights / total, sizes)
    plain = np.einsum("bthsk,bhkd->bthsd", visible / total, sizes)
    rounding = unit * (weighed + np.abs(want)) + tiny * (1 + plain)
    error = np.expm1(2 * delta) * (weighed + np.abs(want)) + 1e-5 * weighed + rounding
    flat = (s.rows * s.tokens, s.heads * s.head_dim)
    return want.reshape(flat), 1.01 * error.reshape(flat)


def _eager_mixture(case: Case, q: np.ndarray, key: np.ndarray) -> np.ndarray:
    """`DmoeAttention` in float32; q [B, T, Hkv, share, D] and the result like it."""
    s = case.sizes
    stacked = q.transpose(0, 2, 3, 1, 4).reshape(s.rows, s.kv_heads, -1, s.head_dim)
    words = (_values(case), case.past_key, case.past_value)
    values = [np.ascontiguousarray(stacked), key, *(from_half(x, case.kind) for x in words)]
    places = np.concatenate([case.past_positions, case.position_ids], axis=1)
    bias = attention_bias(torch.from_numpy(case.position_ids), torch.from_numpy(places), s.block_length)
    mixed = attention(*map(torch.from_numpy, values), bias).numpy()
    return mixed.reshape(s.rows, s.kv_heads, -1, s.tokens, s.head_dim).transpose(0, 3, 1, 2, 4)


def _values(case: Case) -> np.ndarray:
    """Raw words of the new values, [B, Hkv, T, D]."""
    s = case.sizes
    of_tokens = case.qkv[:, -s.kv_heads * s.head_dim:].reshape(s.rows, s.tokens, s.kv_heads, s.head_dim)
    return of_tokens.transpose(0, 2, 1, 3)


def _queries(case: Case) -> np.ndarray:
    """[B, T, Hq, D] in float32, not rounded: the eager op's, which it returns if they are given as keys."""
    s = case.sizes
    q = case.qkv[:, :s.heads * s.head_dim]
    cache = np.zeros((s.rows, s.heads, s.past, s.head_dim), np.uint16)
    as_keys = replace(case, qkv=np.tile(q, 3), past_key=cache, past_value=cache, k_norm=case.q_norm)
    return eager(as_keys)[1].transpose(0, 2, 1, 3) * np.float32(s.head_dim**-0.5)


def assert_right(case: Case) -> np.ndarray:
    """The kernels' key and value against the eager op, `mixed` against `mixture`. Returns the words of mixed."""
    words = run(case)
    assert_words_right(case, words)
    return words[0]


def assert_words_right(case: Case, words: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    """The same for what `run` has returned, wherever it ran."""
    mixed, key, value = (from_half(x, case.kind) for x in words)
    _, want_key, want_value = eager(case)
    unit, tiny = unit_of(case.kind)
    np.testing.assert_array_equal(words[2], _values(case))
    np.testing.assert_array_equal(value, want_value)
    # Rotating adds two products, each off by a few float32 roundings.
    off = np.abs(key - want_key)
    assert (off <= unit * np.abs(want_key) + tiny + 1e-6 * np.abs(want_key).max(axis=-1, keepdims=True)).all()
    real = seen(case).any(axis=-1).reshape(-1)
    assert not mixed[~real].any() and np.isfinite(mixed).all()
    want, allowed = mixture(case, key)
    error = np.abs(mixed - want)[real]
    assert (error <= allowed[real]).all(), f"{(error / allowed[real]).max():.2f} times the allowed error"
