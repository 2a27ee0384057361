"""The salient graphs of a bundle on ONNX Runtime's CPU provider."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ...bundle.graph_entries import GraphEntry
from ...bundle.reader import Bundle, check_unchanged
from ..backend import closed
from ..salient import Arrays, GraphName, salient_files
from ..salient_host import HostSalient
from .session import CpuSession


class OnnxRuntimeSalient(HostSalient):
    """Sessions over the salient graphs, each opened when it first runs."""

    def __init__(self, bundle: Bundle, capacity: int | None, open_graph: Callable[[GraphEntry], CpuSession]) -> None:
        """Raises RequestError where the bundle has no graph for this."""
        super().__init__(bundle.manifest.model, capacity)
        self._files = salient_files(bundle, capacity)
        self._bundle, self._open = bundle, open_graph
        self._sessions: dict[GraphName, CpuSession] = {}
        self._closed = False
        routing = bundle.manifest.routing
        self._defaults: dict[str, Any] = {
            "top_p": np.array([routing.top_p], np.float32), "min_experts": np.array([routing.min_experts], np.int64),
            "coreset_size": np.array([routing.coreset_size], np.int64)}

    def compute(self, graph: GraphName, feeds: Arrays, settings: dict[str, float | int], want_logits: bool) -> Arrays:
        """See `HostSalient`."""
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
