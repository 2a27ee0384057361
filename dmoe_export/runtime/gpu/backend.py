"""The half that GPU backends share: what goes to the device and comes back, the cache there, recorded steps."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...bundle.contract import KEPT
from ...bundle.reader import Bundle
from ...description import RUNTIME_SETTINGS
from ..backend import ForwardInputs, ForwardOutputs, closed
from ..library import Kernels
from .cache import DeviceCache, DevicePart, Positions
from .call import ITEMSIZES, Call, Executor, Layout, Sizes, Tensor, round_up
from .device import Device, Strided
from .graphs import GraphCache
from .memory import Buffer, Pool
from .slab import Geometry, Slab


class DeviceBackend:
    """Runs an executor on one stream of a device.

    Several requests, in threads if they like, share one backend: each has its own cache, forwards and commits take
    turns under a lock. Every step moves ids, positions and settings to the device in one copy (and the cache's
    positions after they changed), and token ids, confidences and expert ids back in another; keys, values and, unless
    wanted, logits stay there.
    """

    def __init__(self, name: str, bundle: Bundle, device: Device, pool: Pool, stream: int, executor: Executor,
                 cuda_graphs: bool = True, lock: threading.RLock | None = None) -> None:
        """`pool` and `executor` must use `stream`. `cuda_graphs`: record steps of one block that repeat.

        `lock` is taken around everything that is enqueued on `stream`; others who use the stream share it.
        """
        manifest = bundle.manifest
        self.name, self.limits = name, executor.limits
        self.kernels = Kernels([], "")
        self.description, self.routing = manifest.model, manifest.routing
        self._device, self._pool, self._stream, self._executor = device, pool, stream, executor
        self.graphs = GraphCache(device, executor) if cuda_graphs else None
        d = self.description
        self._geometry = Geometry(2 * d.num_layers, d.num_kv_heads, d.head_dim, ITEMSIZES[executor.precision])
        self._keeps_logits = manifest.denoiser.keeps_logits
        self._settings = {name: getattr(self.routing, name) for name in RUNTIME_SETTINGS[self.routing.mode]}
        self._lock = lock or threading.RLock()
        # Buffers that every step uses keep their addresses, so that recorded steps can be replayed.
        self._buffers: dict[str, Buffer] = {}
        self._pinned: dict[str, NDArray[np.uint8]] = {}
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
            self._executor.close()
            self._buffers.clear()
            self._pinned.clear()
            self._dropped = None
            self._pool.release()

    def _forward(self, inputs: ForwardInputs, past: DevicePart) -> ForwardOutputs:
        rows, tokens = inputs.input_ids.shape
        wanted = inputs.logit_rows.shape[1]
        d, block = self.description, self.routing.block_length
        # A forward that wants no vocabulary row keeps M = 1; all others come in multiples of the block length.
        step = block if (inputs.logit_rows >= 0).any() else 1
        sizes = self._executor.fit(Sizes(rows, tokens, past.length, wanted), step)
        # Places of a row whose logits leave: all of them, where the graph is older than `logits_kept`.
        kept = sizes.rows if inputs.want_logits or not self._keeps_logits else 1
        staged, host = self._stage(inputs, past.table, sizes, kept)
        experts = (len(d.moe_layers), rows, sizes.tokens, d.moe.experts_per_token if d.moe else 0)
        results = Layout([("token_ids", (rows, sizes.rows), "int64"), ("confidence", (rows, sizes.rows), "fp32"),
                          *([("expert_ids", experts, "int32")] if d.moe else [])])
        new = self._new_slab(rows, sizes.tokens, inputs.want_keys_values)
        places = (self._buffer("staged", staged.size), self._buffer("results", results.size),
                  self._buffer("logits", rows * kept * d.vocab_size * 4))

        def call() -> Call:
            logits = Tensor(places[2], (rows, kept, d.vocab_size), "fp32")
            positions = Tensor(past.positions_address, (rows, past.length), "int64")
            return Call(sizes, {**staged.tensors(places[0], host), "past_positions": positions,
                                **self._layers("past_", past)},
                        {**results.tensors(places[1]), "logits": logits, **self._layers("", new)})

        # What repeats: steps of a block, alone or with what lies before it (a block; shifted logits: a place), and of
        # a whole canvas.
        if self.graphs is not None and (sizes.tokens <= 2 * block or d.attention == "full"):
            self.graphs.run((sizes, kept, *places, past.address, past.slab.part_bytes, new.address), call, self._stream)
        else:
            self._executor.execute(call(), self._stream)
        fetched = self._host("results", results.size)
        self._device.copy(fetched.ctypes.data, places[1], results.size, self._stream)
        logits = self._fetch_logits(places[2], sizes, wanted) if inputs.want_logits else None
        self._device.synchronize(self._stream)
        past.table.stale = False
        return ForwardOutputs(results.view(fetched, "token_ids")[:, :wanted].copy(),
                              results.view(fetched, "confidence")[:, :wanted].copy(),
                              results.view(fetched, "expert_ids")[:, :, :tokens].copy() if d.moe
                              else np.zeros((0, rows, tokens, 0), np.int32),
                              None if logits is None else logits.copy(), new if inputs.want_keys_values else None)

    def _stage(self, inputs: ForwardInputs, table: Positions, sizes: Sizes, kept: int) -> tuple[Layout, int]:
        """Enqueue what the host gives; its layout on the device, and the address of the host's copy."""
        layout = Layout([("input_ids", (sizes.batch, sizes.tokens), "int64"),
                         ("position_ids", (sizes.batch, sizes.tokens), "int64"),
                         ("logit_rows", (sizes.batch, sizes.rows), "int64"),
                         *([(KEPT, (kept,), "int64")] if self._keeps_logits else []),
                         *((name, (1,), "fp32" if name == "top_p" else "int64") for name in self._settings)])
        block = self._host("staged", layout.size)
        for name, values, padding in (("input_ids", inputs.input_ids, 0), ("position_ids", inputs.position_ids, -1),
                                      ("logit_rows", inputs.logit_rows, -1)):
            array = layout.view(block, name)
            array[:, :values.shape[1]] = values
            array[:, values.shape[1]:] = padding
        for name, default in self._settings.items():
            layout.view(block, name)[0] = inputs.settings.get(name, default)
        self._device.copy(self._buffer("staged", layout.size), block.ctypes.data, layout.size, self._stream)
        if table.stale:
            size = table.values.nbytes
            positions = self._host("positions", size)
            positions[:size].view(np.int64)[:] = table.values.ravel()
            self._device.copy(table.address, positions.ctypes.data, size, self._stream)
        return layout, block.ctypes.data

    def _fetch_logits(self, address: int, sizes: Sizes, wanted: int) -> NDArray[Any]:
        """Enqueue fetching the wanted rows of [B, M, V]; a view of pinned memory, valid until the next forward."""
        row = self.description.vocab_size * 4
        size = sizes.batch * wanted * row
        fetched = self._host("logits", size)
        self._device.copy_3d(Strided(fetched.ctypes.data, wanted * row, sizes.batch),
                             Strided(address, sizes.rows * row, sizes.batch), (1, sizes.batch, wanted * row),
                             self._stream)
        return fetched[:size].view(np.float32).reshape(sizes.batch, wanted, -1)

    def _new_slab(self, rows: int, tokens: int, wanted: bool) -> Slab:
        """Where the new keys and values go; a wanted one belongs to the caller until it is committed."""
        if wanted:
            return Slab(self._pool, self._geometry, rows, tokens)
        if self._dropped is None or (self._dropped.rows, self._dropped.length) != (rows, tokens):
            self._dropped = Slab(self._pool, self._geometry, rows, tokens)
        return self._dropped

    def _layers(self, prefix: str, slab: Slab | DevicePart) -> dict[str, Tensor]:
        layers = self.description.num_layers
        return {f"{prefix}{part}.{layer}": Tensor(slab.part(i * layers + layer), slab.shape, self._executor.precision)
                for i, part in enumerate(("key", "value")) for layer in range(layers)}

    def _buffer(self, name: str, size: int) -> int:
        """Address of a buffer that lasts, made larger when it must be."""
        if name not in self._buffers or self._buffers[name].size < size:
            self._buffers[name] = self._pool.allocate(size)
        return self._buffers[name].address

    def _host(self, name: str, size: int) -> NDArray[np.uint8]:
        """Pinned memory that lasts, likewise."""
        if name not in self._pinned or len(self._pinned[name]) < size:
            self._pinned[name] = self._device.pinned(round_up(size, 4096))
        return self._pinned[name]
