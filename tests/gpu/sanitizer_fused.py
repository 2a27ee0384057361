"""The fused ops' calls for sanitizer_driver.py: attention, router, norm, mixture and head at small and odd sizes."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from gpu_common import MODES, ExpertsShapeC, KernelLibrary, RouteAttributesC

FP16, BF16 = 0, 1
# kind, B, T, S, Hq, Hkv, D, R, block: one tile and several, an odd head, a cache of one place and of many chunks
ATTENTIONS = [(FP16, 1, 32, 96, 4, 1, 64, 32, 32), (BF16, 2, 5, 1, 2, 2, 40, 8, 0),
              (FP16, 1, 33, 1300, 2, 1, 128, 64, 32)]
# kind, B, T, E, k, H
ROUTERS = [(FP16, 1, 32, 64, 8, 2056), (BF16, 2, 3, 9, 2, 8)]
NORMS = [(FP16, 5, 264), (BF16, 1, 8200)]  # kind, N, H
MIXTURES = [(FP16, 9, 3, 5, 136, 24, 72), (BF16, 40, 2, 4, 72, 16, 40)]  # kind, N, k, E, H, I', Is
HEADS = [(FP16, 2, 5, 4, 1, 72, 300), (BF16, 1, 3, 33, 33, 264, 129)]  # kind, B, T, M, L, H, V


class SharedC(ctypes.Structure):
    """DmoeSharedExpert."""

    _fields_ = [("width", ctypes.c_int32), ("gate_up", ctypes.c_void_p), ("down", ctypes.c_void_p)]


def ints(*values: float) -> Any:
    """A structure of 32-bit fields; a float is one as its bits."""
    words = [int(np.float32(v).view(np.int32)) if isinstance(v, float) else v for v in values]
    return (ctypes.c_int32 * len(words))(*words)


def words(rng: np.random.Generator, kind: int, *size: int, scale: float = 1.0) -> np.ndarray:
    """Random 16-bit floats."""
    values = (rng.standard_normal(size) * scale).astype(np.float32)
    if kind == FP16:
        return values.astype(np.float16).view(np.uint16)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def finite(got: np.ndarray, kind: int) -> bool:
    """No NaN and no infinity among 16-bit words."""
    exponent = 0x7C00 if kind == FP16 else 0x7F80
    return bool(((got & exponent) != exponent).all())


def run_attention(memory: Any, library: KernelLibrary, enqueue: Any, case: tuple[int, ...]) -> None:
    """All of the cache but its first place is seen."""
    kind, rows, tokens, past, heads, kv_heads, dim, rotary, block = case
    rng = np.random.default_rng(past)
    angles = rng.standard_normal((rows, tokens, rotary // 2), np.float32)
    places = np.tile(np.arange(past, dtype=np.int64), (rows, 1))
    places[:, 0] = -1
    new = np.tile(past + np.arange(tokens, dtype=np.int64), (rows, 1))
    cache = [words(rng, kind, rows, kv_heads, past, dim) for _ in range(2)]
    inputs = [words(rng, kind, rows * tokens, (heads + 2 * kv_heads) * dim), np.cos(angles), np.sin(angles), new,
              places, *cache, *(words(rng, kind, dim) for _ in range(2))]
    shape = ints(*case[1:8], block, kind, 1e-6)
    out = [rows * tokens * heads * dim, *[rows * kv_heads * tokens * dim] * 2]
    addresses = [memory.put(x) for x in inputs] + [memory.empty(2 * size) for size in out]
    addresses.append(memory.empty(library.workspace_of("dmoe_self_attention", shape)))
    enqueue(memory.stream, lambda: library.call("dmoe_self_attention", (shape,), addresses, memory.stream))
    for address, size in zip(addresses[9:], out, strict=False):
        assert finite(memory.get(address, (size,), np.uint16), kind)


def run_router(memory: Any, library: KernelLibrary, enqueue: Any, case: tuple[int, ...]) -> None:
    """Ids must be experts."""
    kind, rows, tokens, experts, k, hidden = case
    rng = np.random.default_rng(hidden)
    shape = ints(rows, tokens, experts, hidden, kind)
    attributes = RouteAttributesC(MODES["top_p"], 32, k, 1, 1, 0, 1, 2.5)
    positions = np.tile(np.arange(tokens, dtype=np.int64), (rows, 1))
    inputs = [words(rng, kind, rows * tokens, hidden), rng.standard_normal((experts, hidden), np.float32),
              rng.standard_normal(experts, np.float32), positions, np.float32([0.6]), np.int64([2]), np.int64([4])]
    addresses = [memory.put(x) for x in inputs]
    addresses += [memory.empty(rows * tokens * n * 4) for n in (k, k, experts)]
    addresses.append(memory.empty(library.workspace_of("dmoe_router", shape)))
    enqueue(memory.stream, lambda: library.call("dmoe_router", (shape, attributes), addresses, memory.stream))
    ids = memory.get(addresses[7], (rows * tokens, k), np.int32)
    assert ids.min() >= -1 and ids.max() < experts and (ids >= 0).any()
    assert np.isfinite(memory.get(addresses[9], (rows, tokens, experts), np.float32)).all()


def run_norm(memory: Any, library: KernelLibrary, enqueue: Any, case: tuple[int, ...]) -> None:
    """Finite."""
    kind, tokens, hidden = case
    rng = np.random.default_rng(hidden)
    addresses = [memory.put(words(rng, kind, *size)) for size in ((tokens, hidden), (tokens, hidden), (hidden,))]
    addresses += [memory.empty(2 * tokens * hidden) for _ in range(2)]
    enqueue(memory.stream, lambda: library.call("dmoe_add_norm", (ints(tokens, hidden, kind), ctypes.c_float(1e-6)),
                                                addresses, memory.stream))
    for address in addresses[3:]:
        assert finite(memory.get(address, (tokens, hidden), np.uint16), kind)


def run_mixture(memory: Any, library: KernelLibrary, enqueue: Any, case: tuple[int, ...]) -> None:
    """A token without experts has the shared one."""
    kind, tokens, k, experts, hidden, width, common = case
    rng = np.random.default_rng(tokens)
    ids = rng.integers(-1, experts + 1, (tokens, k)).astype(np.int32)
    ids[-1] = -1

    def slabs(width: int, *lead: int) -> list[int]:
        return [memory.put(words(rng, kind, *lead, *size, scale=size[1] ** -0.5)) for size in ((2 * width, hidden),
                                                                                               (hidden, width))]

    shared = SharedC(common, *slabs(common))
    shape = ExpertsShapeC(tokens, k, experts, hidden, width, kind)
    addresses = [memory.put(x) for x in (words(rng, kind, tokens, hidden), ids, rng.random((tokens, k), np.float32))]
    addresses += [*slabs(width, experts), memory.empty(2 * tokens * hidden)]
    addresses.append(memory.empty(library.workspace_of("dmoe_mixture", shape, shared)))
    enqueue(memory.stream, lambda: library.call("dmoe_mixture", (shape, shared, None, None), addresses, memory.stream))
    mixed = memory.get(addresses[5], (tokens, hidden), np.uint16)
    assert finite(mixed, kind) and (mixed & 0x7FFF).any(axis=1).all()


def run_head(memory: Any, library: KernelLibrary, enqueue: Any, case: tuple[int, ...]) -> None:
    """An answer is a token, not the mask."""
    kind, rows, tokens, wanted, kept, hidden, vocabulary = case
    rng = np.random.default_rng(vocabulary)
    shape, attributes = ints(*case[1:], kind), ints(1e-5, 7)
    inputs = [words(rng, kind, rows * tokens, hidden), words(rng, kind, hidden), words(rng, kind, vocabulary, hidden),
              rng.integers(-1, tokens, (rows, wanted))]
    sizes = rows * wanted * 8, rows * wanted * 4, rows * kept * vocabulary * 4
    addresses = [memory.put(x) for x in inputs] + [memory.empty(size) for size in sizes]
    addresses.append(memory.empty(library.workspace_of("dmoe_head", shape)))
    enqueue(memory.stream, lambda: library.call("dmoe_head", (shape, attributes), addresses, memory.stream))
    ids = memory.get(addresses[4], (rows, wanted), np.int64)
    assert ids.min() >= 0 and ids.max() < vocabulary and (ids != 7).all()
    assert np.isfinite(memory.get(addresses[6], (rows, kept, vocabulary), np.float32)).all()


RUNS = [(run_attention, ATTENTIONS), (run_router, ROUTERS), (run_norm, NORMS), (run_mixture, MIXTURES),
        (run_head, HEADS)]
