"""Polygraphy runners: the reference, a backend as it is, and a graph opened at every layer."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import replace
from typing import Any

import numpy as np
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata

from ..bundle.contract import ATTENTION_POSITIONS, KEPT
from ..bundle.reader import Bundle
from ..description import ModelDescription, Precision
from ..runtime.backend import Backend, ForwardOutputs, Limits
from ..runtime.cache import HostCache
from ..runtime.edited import EditedGraph
from ..runtime.graph_errors import not_loaded
from ..runtime.ort import EXTERNAL_FOLDER, ort
from .feed import forward_inputs
from .instrument import OpenedGraph
from .reference import Reference, named_outputs

Arrays = dict[str, np.ndarray]
DTYPES: dict[str, Any] = {"fp32": np.float32, "fp16": np.float16}


class _Runner(BaseRunner):
    """Takes the feeds it is told of; times what `run` does."""

    def __init__(self, name: str, feeds: list[Arrays]) -> None:
        super().__init__(name)
        self._feeds = feeds

    def get_input_metadata_impl(self) -> Any:
        metadata = TensorMetadata()
        for name, array in self._feeds[0].items():
            metadata.add(name, array.dtype, [None] * array.ndim)  # rows and tokens differ from feed to feed
        return metadata

    def infer_impl(self, feed_dict: Arrays) -> OrderedDict[str, np.ndarray]:
        start = time.perf_counter()
        outputs = OrderedDict(self.run(feed_dict))
        self.inference_time = time.perf_counter() - start
        return outputs

    def run(self, feed: Arrays) -> Arrays:
        """One forward."""
        raise NotImplementedError


class ReferenceRunner(_Runner):
    """The eager model; its cache grows with the feeds."""

    def __init__(self, reference: Reference, feeds: list[Arrays]) -> None:
        super().__init__("reference", feeds)
        self._reference = reference

    def activate_impl(self) -> None:
        """An empty cache."""
        self._cache = self._reference.backend.new_cache(len(self._feeds[0]["input_ids"]))

    def run(self, feed: Arrays) -> Arrays:
        """One forward and its commit."""
        arrays, out = self._reference.forward(feed, self._cache)
        self._cache.commit(forward_inputs(feed), out, feed["commit"])
        return arrays


class SequenceRunner(_Runner):
    """A backend as it is, with its own cache; as many rows at once as it takes."""

    def __init__(self, backend: Backend, precision: Precision, feeds: list[Arrays]) -> None:
        super().__init__(backend.name, feeds)
        self._backend, self._precision = backend, precision

    def activate_impl(self) -> None:
        """Empty caches, one for each group of rows that the backend takes at once."""
        rows = len(self._feeds[0]["input_ids"])
        step = min((self._backend.limits or Limits()).max_batch or rows, rows)
        self._parts = [slice(i, min(i + step, rows)) for i in range(0, rows, step)]
        self._caches = [self._backend.new_cache(part.stop - part.start) for part in self._parts]

    def run(self, feed: Arrays) -> Arrays:
        """One forward of all rows and its commit."""
        return _joined([self._forward(feed, part, cache)
                        for part, cache in zip(self._parts, self._caches, strict=True)])

    def _forward(self, feed: Arrays, part: slice, cache: Any) -> Arrays:
        inputs = forward_inputs(feed, part)
        out = self._backend.forward(inputs, cache)
        if feed["commit"][part].any():
            cache.commit(inputs, out, feed["commit"][part])
        out = _on_host(out, cache, self._precision, inputs.input_ids.shape[1])
        return named_outputs(out, self._backend.description.moe_layers)


class LayersRunner(_Runner):
    """A graph opened at every layer, on ONNX Runtime's CPU provider, fed with the reference's streams and cache."""

    def __init__(self, graph: OpenedGraph, bundle: Bundle, d: ModelDescription, precision: Precision,
                 feeds: list[Arrays], routing: Arrays) -> None:
        """`bundle`: where the weights lie. `routing`: the run-time routing settings as the graph takes them."""
        super().__init__("layers alone", feeds)
        self._graph, self._bundle, self._hidden = graph, bundle, d.hidden_size
        self._dtype, self._routing = DTYPES[precision], routing

    def activate_impl(self) -> None:
        """Load the opened graph."""
        self._session = session_in(self._graph.graph, self._bundle)

    def deactivate_impl(self) -> None:
        """Unload it."""
        del self._session

    def run(self, feed: Arrays) -> Arrays:
        """All layers, each from the reference's stream."""
        given = {ATTENTION_POSITIONS: feed["position_ids"], **feed, **self._routing,
                 KEPT: np.zeros(feed["logit_rows"].shape[1], np.int64)}
        names = [i.name for i in self._session.get_inputs()]
        feeds = {name: self._converted(name, given[name]) for name in names}
        raw = self._session.run(list(self._graph.outputs.values()), feeds)
        shape = (*feed["input_ids"].shape, -1)
        return {name: x.reshape(shape) if x.ndim == 2 and _is_stream(name) else x
                for name, x in zip(self._graph.outputs, raw, strict=True)}

    def _converted(self, name: str, array: np.ndarray) -> np.ndarray:
        if name.startswith("stream."):
            array = array.reshape(-1, self._hidden)
        return array.astype(self._dtype) if array.dtype == np.float32 and name != "top_p" else array


def session_in(graph: EditedGraph, bundle: Bundle) -> ort.InferenceSession:
    """A CPU session of an edited graph over a bundle's data files; raises BundleError."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry(EXTERNAL_FOLDER, str(graph.folder))
    try:
        return ort.InferenceSession(graph.model, options, providers=["CPUExecutionProvider"], enable_fallback=0)
    except Exception as error:  # onnxruntime raises its own kinds
        name = f"{bundle.folder} (an edited graph)"
        raise not_loaded(error, name, None, bundle.manifest.denoiser.opset) from error


def _is_stream(name: str) -> bool:
    return name.split(".")[0] in ("stream", "attention", "feed_forward")


def _joined(parts: list[Arrays]) -> Arrays:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _on_host(out: ForwardOutputs, cache: Any, precision: Precision, tokens: int) -> ForwardOutputs:
    """The outputs with keys and values as arrays, wherever the backend keeps them."""
    if isinstance(cache, HostCache):
        return out
    wide = [_floats(part[:, :, :tokens], precision) for part in cache.fetch(out)]
    half = len(wide) // 2
    return replace(out, keys_values=(wide[:half], wide[half:]))


def _floats(raw: np.ndarray, precision: Precision) -> np.ndarray:
    """Bytes of a part as numbers."""
    if precision == "bf16":
        return (np.ascontiguousarray(raw).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.ascontiguousarray(raw).view(DTYPES[precision])


def streams_feeds(reference: list[Arrays]) -> list[Arrays]:
    """What the opened graph is fed: of every forward of the reference, the feed, its streams and its cache."""
    wanted = ("input_ids", "position_ids", "logit_rows", ATTENTION_POSITIONS, "past_positions", "past_key",
              "past_value", "stream")
    return [{name: array for name, array in arrays.items() if name.split(".")[0] in wanted} for arrays in reference]

