"""The matrix products of one forward, from the model's sizes alone, each timed by itself with ONNX Runtime.

Weights come from a bank much larger than the processor's caches, a different piece for every product, so they are read
from memory as in a real forward. The time of a call is taken off: it is measured on a product of 1 × 1.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..description import ModelDescription
from .limits import one_node

_BANK = 1 << 27  # floats: 512 MiB, or as large as the largest weight
_REST = 0.01  # seconds; workers of ONNX Runtime spin for about one thousandth after a call
Kind = Literal["weight", "scores", "mix"]


@dataclass(frozen=True)
class Product:
    """`batch` × [rows, inner] · [inner, columns]; a weight lies transposed, [columns, inner], as stored."""

    part: str
    kind: Kind
    rows: int
    columns: int
    inner: int
    batch: int = 1

    @property
    def flop(self) -> int:
        """Multiplications and additions."""
        return 2 * self.batch * self.rows * self.columns * self.inner

    @property
    def values(self) -> int:
        """Numbers of the right-hand side: the weight, or the cached keys or values."""
        return self.batch * self.columns * self.inner


def products_of(d: ModelDescription, tokens: int, rows: int, cached: int,
                experts: Sequence[Sequence[int]]) -> list[Product]:
    """Products of a forward of T `tokens` against S `cached` ones that asks for M `rows` of the vocabulary.

    `experts`: per MoE layer, the tokens of each active expert.
    """
    found: list[Product] = []
    hidden, share = d.hidden_size, d.num_heads // d.num_kv_heads

    def weight(part: str, columns: int, inner: int, count: int = tokens) -> None:
        found.append(Product(part, "weight", count, columns, inner))

    def feed_forward(width: int) -> None:
        weight("ffn", width, hidden)
        weight("ffn", width, hidden)
        weight("ffn", hidden, width)

    for layer in range(d.num_layers):
        weight("attention", (d.num_heads + 2 * d.num_kv_heads) * d.head_dim, hidden)
        keys = cached + tokens
        found.append(Product("attention", "scores", share * tokens, keys, d.head_dim, d.num_kv_heads))
        found.append(Product("attention", "mix", share * tokens, d.head_dim, keys, d.num_kv_heads))
        weight("attention", hidden, d.num_heads * d.head_dim)
        if layer not in d.moe_layers:
            feed_forward(d.dense_width)
            continue
        moe = d.experts
        weight("router", moe.num_experts, hidden)
        for count in experts[layer - d.moe_layers.start]:
            weight("experts", 2 * moe.expert_width, hidden, count)
            weight("experts", hidden, moe.expert_width, count)
        if moe.shared_width:
            feed_forward(moe.shared_width)
    weight("head", d.vocab_size, hidden, rows)
    return found


class Bench:
    """Times products one after the other."""

    def __init__(self, largest: int, threads: int, seed: int = 0) -> None:
        """`largest`: numbers of the largest right-hand side."""
        piece = np.random.default_rng(seed).standard_normal(1 << 20, np.float32)
        self._bank = np.resize(piece, max(_BANK, largest))
        self._place = 0
        self._outputs: dict[tuple[int, ...], NDArray[np.float32]] = {}
        wide: list[list[int | str]] = [["n", "r", "k"], ["n", "c", "k"]]
        self._sessions = {
            "weight": one_node("Gemm", {"transB": 1}, [["r", "k"], ["c", "k"]], threads),
            "scores": one_node("FusedMatMul", {"transB": 1}, wide, threads, "com.microsoft"),
            "mix": one_node("MatMul", {}, [["n", "r", "k"], ["n", "k", "c"]], threads)}
        tiny = Product("", "weight", 1, 1, 1)
        self.call_seconds = float(np.median([self._run(tiny) for _ in range(200)]))

    def seconds(self, products: Sequence[Product]) -> list[float]:
        """Of each product, once, without the call; session by session, and no other session's workers still spin."""
        found = [0.0] * len(products)
        for kind in self._sessions:
            mine = [i for i, product in enumerate(products) if product.kind == kind]
            time.sleep(_REST)
            self._run(products[mine[0]])  # wakes the workers
            for i in mine:
                found[i] = max(0.0, self._run(products[i]) - self.call_seconds)
        time.sleep(_REST)
        return found

    def _run(self, p: Product) -> float:
        lead = () if p.kind == "weight" else (p.batch,)
        right = (p.inner, p.columns) if p.kind == "mix" else (p.columns, p.inner)
        a, b, out = (*lead, p.rows, p.inner), (*lead, *right), (*lead, p.rows, p.columns)
        binding = self._sessions[p.kind].io_binding()
        self._bind(binding, "a", a, 0)
        if self._place + p.values > len(self._bank):
            self._place = 0
        self._bind(binding, "b", b, self._place)
        self._place += -(-p.values // 1024) * 1024
        c = self._outputs.setdefault(out, np.zeros(out, np.float32))
        binding.bind_output("c", "cpu", 0, np.float32, out, c.ctypes.data)
        start = time.perf_counter()
        self._sessions[p.kind].run_with_iobinding(binding)
        return time.perf_counter() - start

    def _bind(self, binding: Any, name: str, shape: tuple[int, ...], place: int) -> None:
        binding.bind_input(name, "cpu", 0, np.float32, shape, self._bank.ctypes.data + 4 * place)
