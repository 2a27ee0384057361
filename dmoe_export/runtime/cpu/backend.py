"""The ONNX Runtime backend: the bundle's graph as it is, on our kernels where they are installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from ...bundle.contract import ATTENTION_POSITIONS, CANVAS_OUTPUTS, KEPT
from ...bundle.graph_entries import GraphEntry
from ...bundle.reader import Bundle
from ...errors import MissingRequirementError
from ..backend import ForwardInputs, ForwardOutputs, Limits, closed
from ..cache import HostCache
from ..candidates import Candidates, best_of
from ..canvas import canvas_feeds, canvas_outputs
from ..edited import EditedGraph
from ..library import ExpertSource
from .library import CpuOps
from .products import Products, products_of
from .salient import OnnxRuntimeSalient
from .session import CpuSession, open_session
from .wanted import Wanted

_CACHE_DTYPES = {"fp32": np.float32, "fp16": np.float16}


def check_precision(bundle: Bundle) -> None:
    """Raise MissingRequirementError where ONNX Runtime has no kernels for a bundle."""
    precision = bundle.manifest.precision
    if precision not in _CACHE_DTYPES:
        raise MissingRequirementError(
            f"{bundle.folder} computes in {precision}, for which ONNX Runtime's CPU provider has no kernels; export "
            "with --compute fp32, which takes weights in bf16, too.")


class OnnxRuntimeBackend:
    """Runs on ONNX Runtime's CPU provider; weights stay memory-mapped, without our kernels those in float32."""

    name = "onnxruntime"
    limits: Limits | None = None

    def __init__(self, bundle: Bundle, threads: int | None = None, graph: EditedGraph | None = None,
                 cpu_ops: CpuOps = "auto", source: ExpertSource | None = None,
                 weights: Mapping[str, Any] | None = None, products: Products = "exact") -> None:
        """Load the graph; `threads` limits the threads of one operator (default: ONNX Runtime's choice).

        `graph`: one in place of the bundle's (checks). `cpu_ops`, `source`, `weights`, `products`: see `open_session`;
        `kernels` and `products` say what it came to.
        """
        check_precision(bundle)
        manifest = bundle.manifest
        self.description, self.routing = manifest.model, manifest.routing
        self._bundle = bundle
        opening = partial(open_session, bundle=bundle, threads=threads, cpu_ops=cpu_ops, source=source, weights=weights,
                          products=products)
        self._open: Callable[[GraphEntry | EditedGraph], CpuSession] | None = opening  # None once closed
        self._salient: dict[int | None, OnnxRuntimeSalient] = {}
        self._dtype = np.dtype(_CACHE_DTYPES[manifest.precision])
        self._session: CpuSession | None = opening(graph or manifest.denoiser)
        self.kernels = self._session.kernels
        on = "ONNX Runtime's own ops" if self.kernels.missing else products_of(manifest, products)
        self.products = f"{products} ({on})"  # fast ones have no kernels missing
        self._keeps_logits = manifest.denoiser.keeps_logits
        self.opens_blocks = manifest.denoiser.opens_blocks
        given = {entry.name for entry in manifest.denoiser.inputs}
        defaults: dict[str, Any] = {
            "top_p": np.array([self.routing.top_p], np.float32),
            "min_experts": np.array([self.routing.min_experts], np.int64),
            "coreset_size": np.array([self.routing.coreset_size], np.int64)}
        self._defaults = {name: value for name, value in defaults.items() if name in given}
        layers = range(self.description.num_layers)
        self._kv_names = [f"{part}.{layer}" for part in ("key", "value") for layer in layers]

    def salient_graphs(self, capacity: int | None) -> OnnxRuntimeSalient:
        """The bundle's salient graphs (`SalientBackend`); raises RequestError where it has none."""
        if self._open is None:
            raise closed(self.name)
        if capacity not in self._salient:
            self._salient[capacity] = OnnxRuntimeSalient(self._bundle, capacity, self._open)
        return self._salient[capacity]

    def new_cache(self, rows: int) -> HostCache:
        """An empty cache in host memory."""
        return HostCache(rows, self.description.cached_heads, self._dtype)

    def forward(self, inputs: ForwardInputs, cache: HostCache) -> ForwardOutputs:
        """Run the graph; only what is wanted is fetched."""
        session = self._session
        if session is None:
            raise closed(self.name)
        canvas = self.description.canvas is not None
        head = Wanted(inputs.logit_rows, inputs.input_ids.shape[1], stay=canvas)
        feeds: dict[str, Any] = {
            "input_ids": inputs.input_ids, "position_ids": inputs.position_ids, "past_positions": cache.positions,
            "logit_rows": head.logit_rows, **canvas_feeds(self.description, inputs)}
        logits_leave = inputs.want_logits or inputs.candidates > 0
        if self._keeps_logits:
            feeds[KEPT] = np.zeros(head.logit_rows.shape[1] if logits_leave else 1, np.int64)
        if self.opens_blocks:
            apart = inputs.attention_positions
            feeds[ATTENTION_POSITIONS] = inputs.position_ids if apart is None else apart
        for name, default in self._defaults.items():
            feeds[name] = np.asarray([inputs.settings.get(name, default[0])], default.dtype)
        feeds.update(zip((f"past_{name}" for name in self._kv_names), (*cache.keys, *cache.values), strict=True))
        wanted = ["token_ids", "confidence", *(["expert_ids"] if self.description.moe else []),
                  *(CANVAS_OUTPUTS if canvas else ())]
        if logits_leave:
            wanted.append("logits")
        if inputs.want_keys_values:
            wanted += self._kv_names
        results = dict(zip(wanted, session.run(wanted, feeds), strict=True))
        layers = self.description.num_layers
        new = [results[name] for name in self._kv_names] if inputs.want_keys_values else []
        found = (best_of(results["logits"], self.description.barred_id, inputs.candidates)
                 if inputs.candidates else None)
        return ForwardOutputs(head.spread(results["token_ids"]), head.spread(results["confidence"]),
                              results.get("expert_ids", np.zeros((0, *inputs.input_ids.shape, 0), np.int32)),
                              head.spread(results["logits"]) if inputs.want_logits else None,
                              (new[:layers], new[layers:]) if new else None,
                              found and Candidates(head.spread(found.token_ids), head.spread(found.logits),
                                                   head.spread(found.mask_logits)),
                              canvas_outputs(results))

    def close(self) -> None:
        """See `Backend`: a forward in progress keeps its session until it ends."""
        for graphs in self._salient.values():
            graphs.close()
        self._session = self._open = None
