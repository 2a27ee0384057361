"""The half that GPU backends share: what goes to the device and comes back, the cache there, recorded steps."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ...bundle.contract import ATTENTION_POSITIONS, KEPT
from ...bundle.graph_entries import GraphEntry
from ...bundle.reader import Bundle
from ..backend import ForwardInputs, ForwardOutputs, closed
from ..canvas import canvas_feeds, canvas_outputs
from ..library import Kernels
from .cache import DeviceCache, DevicePart, Positions
from .call import ITEMSIZES, Call, Executor, Layout, Settings, Sizes, Tensor
from .candidates import LogitsTaker
from .canvas import canvas_layout, drawn_layout
from .device import Device
from .graphs import GraphCache
from .memory import Pool
from .salient import DeviceSalient
from .slab import Geometry, Slab
from .staging import Staging


class DeviceBackend:
    """Runs an executor on one stream of a device.

    Several requests, in threads if they like, share one backend: each has its own cache, forwards and commits take
    turns under a lock. Every step moves ids, positions and settings to the device in one copy (and the cache's
    positions after they changed), and token ids, confidences and expert ids back in another; keys, values and, unless
    wanted, logits stay there.
    """

    def __init__(self, name: str, bundle: Bundle, device: Device, pool: Pool, stream: int, executor: Executor,
                 find_graph: Callable[[GraphEntry], Callable[[], Executor]], cuda_graphs: bool = True,
                 lock: threading.RLock | None = None, ranking: Path | None = None) -> None:
        """`pool` and `executor` must use `stream`. `cuda_graphs`: record steps of one block that repeat.

        `lock` is taken around everything that is enqueued on `stream`; others who use the stream share it.
        `find_graph`: what opens an executor of another graph of the bundle, for salient steps.
        `ranking`: the library whose kernel ranks candidates; None: the host does.
        """
        manifest = bundle.manifest
        self.name, self.limits = name, executor.limits
        self.kernels = Kernels([], "")
        self.description, self.routing = manifest.model, manifest.routing
        self._device, self._pool, self._stream, self._executor = device, pool, stream, executor
        self.graphs = GraphCache(device, executor) if cuda_graphs else None
        d = self.description
        self._geometry = Geometry.of_layers(d.cached_heads, ITEMSIZES[executor.precision])
        self._keeps_logits = manifest.denoiser.keeps_logits
        self.opens_blocks = manifest.denoiser.opens_blocks
        self._settings = Settings(self.routing)
        self._lock = lock or threading.RLock()
        self._bundle, self._find_graph = bundle, find_graph
        self._salient: dict[int | None, DeviceSalient] = {}
        self._staging = Staging(device, pool, stream)
        self._logits = LogitsTaker(self._staging, stream, d.barred_id, ranking)
        self._closed = False
        self._dropped: Slab | None = None  # where keys and values go that nobody wants

    @property
    def placement(self) -> dict[str, int]:
        """Nodes of the graph by the provider of ONNX Runtime that computes them; empty where nobody tells."""
        return getattr(self._executor, "placement", {})

    def end_profile(self) -> Path:
        """End ONNX Runtime's profile, where it was opened with one; the file it wrote."""
        return Path(self._executor.end_profile())  # type: ignore[attr-defined]

    def new_cache(self, rows: int) -> DeviceCache:
        """An empty cache on the device."""
        if self._closed:
            raise closed(self.name)
        capacity = self.limits.max_context if self.limits else None
        return DeviceCache(rows, self._geometry, self._pool, self._stream, self._lock, capacity)

    def salient_graphs(self, capacity: int | None) -> DeviceSalient:
        """The bundle's salient graphs of that capacity, by default of all it has (`SalientBackend`).

        Raises RequestError where the bundle has none of fixed shapes, or no engine of one.
        """
        with self._lock:
            if self._closed:
                raise closed(self.name)
            if capacity not in self._salient:
                self._salient[capacity] = DeviceSalient(
                    self.name, self._bundle, capacity, self._find_graph, self._staging, self._logits, self._pool,
                    self._stream, self._lock, self.graphs is not None)
            return self._salient[capacity]

    def forward(self, inputs: ForwardInputs, cache: DeviceCache | DevicePart) -> ForwardOutputs:
        """One forward; raises RequestError past the engine's limits, DeviceError when the device fails."""
        with self._lock:
            if self._closed:
                raise closed(self.name)
            return self._forward(inputs, cache.whole if isinstance(cache, DeviceCache) else cache)

    def close(self) -> None:
        """See `Backend`; memory of caches that somebody still holds goes with the backend itself."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._device.synchronize(self._stream)
            if self.graphs:
                self.graphs.clear()
            for salient in self._salient.values():
                salient.close()
            del self._find_graph  # it may hold weights
            self._executor.close()
            self._staging.clear()
            self._dropped = None
            self._pool.release()

    def _forward(self, inputs: ForwardInputs, past: DevicePart) -> ForwardOutputs:
        rows, tokens = inputs.input_ids.shape
        wanted = inputs.logit_rows.shape[1]
        d, block = self.description, self.description.step_tokens(self.routing)
        # A forward that wants no vocabulary row keeps M = 1; all others come in multiples of the block length.
        step = block if (inputs.logit_rows >= 0).any() else 1
        sizes = self._executor.fit(Sizes(rows, tokens, past.length, wanted), step)
        # Places of a row whose logits leave: all of them, where the graph is older than `logits_kept`.
        kept = sizes.rows if inputs.want_logits or inputs.candidates or not self._keeps_logits else 1
        staged = self._stage(inputs, past.table, sizes, kept)
        experts = (len(d.moe_layers), rows, sizes.tokens, d.moe.experts_per_token if d.moe else 0)
        results = Layout([("token_ids", (rows, sizes.rows), "int64"), ("confidence", (rows, sizes.rows), "fp32"),
                          *([("expert_ids", experts, "int32")] if d.moe else []),
                          *(drawn_layout(rows, sizes.rows, d.hidden_size) if d.canvas else [])])
        new = self._new_slab(rows, sizes.tokens, inputs.want_keys_values)
        places = (staged["input_ids"].address, self._staging.buffer("results", results.size),
                  self._staging.buffer("logits", rows * kept * d.vocab_size * 4))

        logits = Tensor(places[2], (rows, kept, d.vocab_size), "fp32")

        def call() -> Call:
            positions = Tensor(past.positions_address, (rows, past.length), "int64")
            return Call(sizes, {**staged, "past_positions": positions, **self._layers("past_", past)},
                        {**results.tensors(places[1]), "logits": logits, **self._layers("", new)})

        # What repeats: steps of a block, alone or with what lies before it (a block; shifted logits: a place), and of
        # a whole canvas; of a canvas of random tokens its steps and the encoding of the last of them; of open blocks.
        repeats = (sizes.tokens == block if d.canvas else
                   sizes.tokens <= 2 * block or d.attention == "full" or inputs.attention_positions is not None)
        if self.graphs is not None and repeats:
            self.graphs.run((sizes, kept, *places, *past.key, new.address), call, self._stream)
        else:
            self._executor.execute(call(), self._stream)
        fetched = self._staging.fetch(results, places[1])
        taken = self._logits.take(logits, wanted, inputs.want_logits, inputs.candidates)
        self._device.synchronize(self._stream)
        past.table.stale = False
        all_of_them, best = taken()
        return ForwardOutputs(results.view(fetched, "token_ids")[:, :wanted].copy(),
                              results.view(fetched, "confidence")[:, :wanted].copy(),
                              results.view(fetched, "expert_ids")[:, :, :tokens].copy() if d.moe
                              else np.zeros((0, rows, tokens, 0), np.int32),
                              all_of_them, new if inputs.want_keys_values else None, best,
                              canvas_outputs({name: results.view(fetched, name) for name in results.names},
                                             lambda array: array[:, :wanted].copy()))

    def _stage(self, inputs: ForwardInputs, table: Positions, sizes: Sizes,
               kept: int) -> dict[str, Tensor]:
        """Enqueue what the host gives; the tensors on the device."""
        layout = Layout([("input_ids", (sizes.batch, sizes.tokens), "int64"),
                         ("position_ids", (sizes.batch, sizes.tokens), "int64"),
                         ("logit_rows", (sizes.batch, sizes.rows), "int64"),
                         *([(KEPT, (kept,), "int64")] if self._keeps_logits else []),
                         *(canvas_layout(sizes, self.description.hidden_size) if inputs.canvas else []),
                         *([(ATTENTION_POSITIONS, (sizes.batch, sizes.tokens), "int64")] if self.opens_blocks else []),
                         *self._settings.layout])
        apart = inputs.position_ids if inputs.attention_positions is None else inputs.attention_positions
        staged = self._staging.send(layout, {
            "input_ids": (inputs.input_ids, 0), "position_ids": (inputs.position_ids, -1),
            "logit_rows": (inputs.logit_rows, -1), **({KEPT: (0, 0)} if self._keeps_logits else {}),
            **({ATTENTION_POSITIONS: (apart, -1)} if self.opens_blocks else {}),
            **{name: (array, 0) for name, array in canvas_feeds(self.description, inputs).items()},
            **self._settings.values(inputs.settings)})
        self._staging.send_positions(table)
        return staged

    def _new_slab(self, rows: int, tokens: int, wanted: bool) -> Slab:
        """Where the new keys and values go; a wanted one belongs to the caller until it is committed."""
        if wanted:
            return Slab(self._pool, self._geometry, rows, tokens)
        if self._dropped is None or (self._dropped.rows, self._dropped.length) != (rows, tokens):
            self._dropped = Slab(self._pool, self._geometry, rows, tokens)
        return self._dropped

    def _layers(self, prefix: str, slab: Slab | DevicePart) -> dict[str, Tensor]:
        layers = self.description.num_layers
        names = [f"{prefix}{part}.{layer}" for part in ("key", "value") for layer in range(layers)]
        return {name: Tensor(slab.part(i), slab.shape(i), self._executor.precision) for i, name in enumerate(names)}
