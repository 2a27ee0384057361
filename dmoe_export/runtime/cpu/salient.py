"""The salient graphs of a bundle on ONNX Runtime's CPU provider."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ...bundle.manifest import GraphEntry
from ...bundle.reader import Bundle, check_unchanged
from ...errors import RequestError
from ..backend import closed
from ..salient import Arrays, GraphName
from .session import CpuSession


class OnnxRuntimeSalient:
    """Sessions over the salient graphs, each opened when it first runs."""

    def __init__(self, bundle: Bundle, capacity: int | None, open_graph: Callable[[GraphEntry], CpuSession]) -> None:
        """Raises RequestError where the bundle has no graph for this."""
        manifest = bundle.manifest
        self.description, self.capacity = manifest.model, capacity
        entry = manifest.salient
        if entry is None:
            raise RequestError(f"{bundle.folder} has no salient graph; export it with --salient, or leave "
                               "salient_threshold out.")
        self._files: dict[GraphName, GraphEntry] = {"any": entry.graph}
        if capacity is not None:
            fixed = {e.capacity: e.graph for e in entry.fixed}
            if capacity not in fixed or entry.fill is None:
                known = f"has graphs for {', '.join(map(str, fixed))}" if fixed else "has none of fixed capacity"
                raise RequestError(f"{bundle.folder} has no salient graph for capacity {capacity}, it {known}; export "
                                   f"it with --salient-capacity {capacity}.")
            self._files = {"fixed": fixed[capacity], "fill": entry.fill}
        self._bundle, self._open = bundle, open_graph
        self._sessions: dict[GraphName, CpuSession] = {}
        self._closed = False
        routing = manifest.routing
        self._defaults: dict[str, Any] = {
            "top_p": np.array([routing.top_p], np.float32), "min_experts": np.array([routing.min_experts], np.int64),
            "coreset_size": np.array([routing.coreset_size], np.int64)}

    def run(self, graph: GraphName, feeds: Arrays, settings: dict[str, float | int], want_logits: bool) -> Arrays:
        """See `SalientGraphs`."""
        entry = self._files[graph]
        given = {tensor.name for tensor in entry.inputs}
        chosen = {name: np.asarray([settings.get(name, default[0])], default.dtype)
                  for name, default in self._defaults.items() if name in given}
        wanted = [tensor.name for tensor in entry.outputs if want_logits or tensor.name != "logits"]
        return dict(zip(wanted, self._session(graph).run(wanted, feeds | chosen), strict=True))

    def _session(self, graph: GraphName) -> CpuSession:
        if self._closed:
            raise closed("onnxruntime")
        if graph not in self._sessions:
            check_unchanged(self._bundle)
            self._sessions[graph] = self._open(self._files[graph])
        return self._sessions[graph]

    def close(self) -> None:
        """See `Backend`."""
        self._closed = True
        self._sessions.clear()
