"""Salient steps on a device: graphs of fixed capacity and the dense one, states in device memory (docs/salient.md).

The graph whose counts come from the data is not used: the device would have to tell the host each layer's count in the
middle of a step, and such a step could not be recorded. Not run on a GPU yet; tests as in onnxruntime.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from ...bundle.manifest import GraphEntry
from ...bundle.reader import Bundle, check_unchanged
from ...description import ModelDescription, Precision
from ..backend import closed
from ..salient import PARTS, Arrays, GraphName, Past, salient_files
from .cache import DevicePart
from .call import ITEMSIZES, Call, Executor, Layout, Settings, Sizes, Tensor
from .candidates import LogitsTaker
from .graphs import GraphCache
from .memory import Pool
from .slab import Geometry, Slab, copy_tokens
from .staging import Staging

_RECORDED = 64
"""Steps kept per graph: each row of a batch has two, as a state is read while the next is written."""


@dataclass(frozen=True)
class DeviceState:
    """State of a range of one sequence: slabs of keys and values, of contexts, of feed-forward outputs."""

    slabs: tuple[Slab, Slab, Slab]

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where the slabs start."""
        return tuple(slab.address for slab in self.slabs)


def state_geometries(d: ModelDescription, precision: Precision) -> tuple[Geometry, Geometry, Geometry]:
    """Of the slabs of a state: keys and values, contexts, feed-forward outputs."""
    size = ITEMSIZES[precision]
    return (Geometry.of_layers(d.cached_heads, size),
            Geometry(((1, d.num_heads * d.head_dim),) * d.num_layers, size),
            Geometry(((1, d.hidden_size),) * d.num_layers, size))


class DeviceSalient:
    """`SalientGraphs` over executors, each opened when its graph first runs."""

    def __init__(self, name: str, bundle: Bundle, capacity: int | None,
                 find_graph: Callable[[GraphEntry], Callable[[], Executor]], staging: Staging, logits: LogitsTaker,
                 pool: Pool, stream: int, lock: threading.RLock, cuda_graphs: bool) -> None:
        """`name`, `staging`, `logits`, `pool`, `stream` and `lock` are the backend's.

        Raises RequestError where the bundle has no graph of this capacity (None: of any fixed one), or `find_graph`
        cannot run one.
        """
        manifest = bundle.manifest
        self.description = d = manifest.model
        self.capacity = capacity
        self._openers = {graph: find_graph(entry)
                         for graph, entry in salient_files(bundle, capacity, fixed_only=True).items()}
        self.capacities = tuple(sorted(graph for graph in self._openers if isinstance(graph, int)))
        self._name, self._bundle = name, bundle
        self._staging, self._logits = staging, logits
        self._pool, self._stream, self._lock = pool, stream, lock
        self._cuda_graphs, self._closed = cuda_graphs, False
        self._block, self._settings = manifest.routing.block_length, Settings(manifest.routing)
        self.opened: dict[GraphName, tuple[Executor, GraphCache | None]] = {}  # with its recorded steps
        self._geometries = state_geometries(d, manifest.precision)

    def run(self, graph: GraphName, feeds: Arrays, past: Past, old: DeviceState | None,
            settings: dict[str, float | int], want_logits: bool, candidates: int) -> tuple[Arrays, DeviceState]:
        """See `SalientGraphs`. Raises DeviceError when the device fails."""
        with self._lock:
            if self._closed:
                raise closed(self._name)
            return self._run(graph, feeds, past, old, settings, want_logits, candidates)

    def cut(self, state: DeviceState, at: int) -> tuple[DeviceState, DeviceState]:
        """See `SalientGraphs`."""
        tokens = state.slabs[0].length
        with self._lock:
            head, tail = self._new(at), self._new(tokens - at)
            self._copy((head, 0), (state, 0), at)
            self._copy((tail, 0), (state, at), tokens - at)
        return head, tail

    def joined(self, head: DeviceState, tail: DeviceState) -> DeviceState:
        """See `SalientGraphs`."""
        first, second = head.slabs[0].length, tail.slabs[0].length
        with self._lock:
            whole = self._new(first + second)
            self._copy((whole, 0), (head, 0), first)
            self._copy((whole, first), (tail, 0), second)
        return whole

    def close(self) -> None:
        """Let go of graphs and sessions; the backend has waited for the stream."""
        self._closed = True
        for executor, graphs in self.opened.values():
            if graphs:
                graphs.clear()
            executor.close()
        self.opened.clear()
        self._openers.clear()  # they may hold weights

    def _run(self, graph: GraphName, feeds: Arrays, past: Past, old: DeviceState | None,
             settings: dict[str, float | int], want_logits: bool, candidates: int) -> tuple[Arrays, DeviceState]:
        executor, graphs = self._executor(graph)
        d, tokens, wanted = self.description, feeds["input_ids"].shape[1], feeds["logit_rows"].shape[1]
        sizes = executor.fit(Sizes(1, tokens, past.positions.shape[1], wanted), self._block)
        layout = Layout([("input_ids", (1, tokens), "int64"), ("position_ids", (1, tokens), "int64"),
                         ("logit_rows", (1, sizes.rows), "int64"), *self._settings.layout,
                         *([("past_positions", past.positions.shape, "int64")] if past.head is not None else []),
                         *([("unmasked", (1, tokens), "bool"), ("threshold", (1,), "fp32")] if old else [])])
        given = {**feeds, "past_positions": past.positions}
        staged = self._staging.send(layout, {
            **{name: (given[name], -1) for name in layout.names if name in given}, **self._settings.values(settings)})
        frozen, where = self._past(past)
        results = Layout([("token_ids", (1, sizes.rows), "int64"), ("confidence", (1, sizes.rows), "fp32"),
                          *([("expert_ids", (len(d.moe_layers), 1, tokens, d.moe.experts_per_token), "int32")]
                            if d.moe else []),
                          *([("salient", (d.num_layers, 1, tokens), "bool")] if old else [])])
        new = self._new(tokens)
        places = (staged["input_ids"].address, self._staging.buffer("results", results.size),
                  self._staging.buffer("logits", sizes.rows * d.vocab_size * 4))

        logits = Tensor(places[2], (1, sizes.rows, d.vocab_size), "fp32")

        def call() -> Call:
            before = {f"range_{name}": tensor for name, tensor in self._tensors(old).items()} if old else {}
            return Call(sizes, {**staged, **frozen, **before},
                        {**results.tensors(places[1]), "logits": logits, **self._tensors(new)})

        if graphs:
            key = (sizes, places, where, old.addresses if old else (), new.addresses)
            graphs.run(key, call, self._stream)
        else:
            executor.execute(call(), self._stream)
        fetched = self._staging.fetch(results, places[1])
        taken = self._logits.take(logits, wanted, want_logits, candidates)
        self._pool.device.synchronize(self._stream)
        if past.cached is not None:
            past.cached.table.stale = False
        got = {name: results.view(fetched, name).copy() for name in results.names}
        got |= {name: got[name][:, :wanted] for name in ("token_ids", "confidence")}
        all_of_them, best = taken()
        return got | {"logits": all_of_them, "candidates": best}, new

    def _past(self, past: Past) -> tuple[dict[str, Tensor], Hashable]:
        """Tensors of what a step does not change, but for staged positions; what tells their addresses."""
        if past.head is not None:
            state: DeviceState = past.head
            tensors = self._tensors(state, ("key", "value"))
            return {f"past_{name}": tensor for name, tensor in tensors.items()}, state.addresses
        part: DevicePart = past.cached
        self._staging.send_positions(part.table)
        tensors = self._parts(part, ("key", "value"))
        tensors["positions"] = Tensor(part.positions_address, past.positions.shape, "int64")
        return {f"past_{name}": tensor for name, tensor in tensors.items()}, part.key

    def _tensors(self, state: DeviceState, names: tuple[str, ...] = PARTS) -> dict[str, Tensor]:
        """Of a range, by the names of the graphs."""
        heads, contexts, ffns = state.slabs
        found = self._parts(heads, ("key", "value"))
        found |= self._parts(contexts, ("context",), flat=True)
        found |= self._parts(ffns, ("ffn",), flat=True)
        return {name: tensor for name, tensor in found.items() if name.partition(".")[0] in names}

    def _parts(self, slab: Slab | DevicePart, names: tuple[str, ...], flat: bool = False) -> dict[str, Tensor]:
        """`flat`: [1, T, width], of parts with one head."""
        layers, found = self.description.num_layers, {}
        for i, name in enumerate(names):
            for layer in range(layers):
                part = i * layers + layer
                rows, heads, tokens, width = slab.shape(part)
                shape = (rows, tokens, width) if flat else (rows, heads, tokens, width)
                found[f"{name}.{layer}"] = Tensor(slab.part(part), shape, self._bundle.manifest.precision)
        return found

    def _new(self, tokens: int) -> DeviceState:
        """Uninitialised."""
        heads, contexts, ffns = (Slab(self._pool, geometry, 1, tokens) for geometry in self._geometries)
        return DeviceState((heads, contexts, ffns))

    def _copy(self, to: tuple[DeviceState, int], source: tuple[DeviceState, int], tokens: int) -> None:
        """Enqueue copying tokens between (state, first token) and another."""
        for mine, theirs in zip(to[0].slabs, source[0].slabs, strict=True):
            copy_tokens(self._pool, (mine, 0, to[1]), (theirs, 0, source[1]), 1, tokens, self._stream)

    def _executor(self, graph: GraphName) -> tuple[Executor, GraphCache | None]:
        if graph not in self.opened:
            check_unchanged(self._bundle)
            executor = self._openers[graph]()
            graphs = GraphCache(self._pool.device, executor, _RECORDED) if self._cuda_graphs else None
            self.opened[graph] = executor, graphs
        return self.opened[graph]
