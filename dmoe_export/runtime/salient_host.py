"""Salient graphs whose states are arrays on the host: by the graphs' names `key.0` …, tokens on axis 2 or 1."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from ..description import ModelDescription
from .candidates import best_of
from .salient import PARTS, Arrays, GraphName, Past


class HostSalient(ABC):
    """`SalientGraphs` for what computes a graph from host arrays."""

    def __init__(self, description: ModelDescription, capacity: int | None) -> None:
        self.description, self.capacity = description, capacity
        self.capacities = () if capacity is None else (capacity,)

    @abstractmethod
    def compute(self, graph: GraphName, feeds: Arrays, settings: dict[str, float | int], want_logits: bool) -> Arrays:
        """All outputs of a graph but, unless wanted, the logits."""

    def run(self, graph: GraphName, feeds: Arrays, past: Past, old: Arrays | None, settings: dict[str, float | int],
            want_logits: bool, candidates: int) -> tuple[Arrays, Arrays]:
        """See `SalientGraphs`."""
        layers = range(self.description.num_layers)
        feeds = {**feeds, "past_positions": past.positions}
        for layer in layers:
            for part, of in (("key", "keys"), ("value", "values")):
                feeds[f"past_{part}.{layer}"] = (past.head[f"{part}.{layer}"] if past.head is not None
                                                 else getattr(past.cached, of)[layer])
        if graph != "fill":
            feeds |= {f"range_{name}": value for name, value in (old or self._nothing(feeds)).items()}
        got = self.compute(graph, feeds, settings, want_logits or candidates > 0)
        if candidates:
            got["candidates"] = best_of(got["logits"], self.description.barred_id, candidates)
        state = {name: got.pop(name) for name in self._names()}
        return got, state

    def cut(self, state: Arrays, at: int) -> tuple[Arrays, Arrays]:
        """See `SalientGraphs`."""
        halves = {name: np.split(value, [at], axis=_axis(name)) for name, value in state.items()}
        return ({name: np.ascontiguousarray(head) for name, (head, _) in halves.items()},
                {name: np.ascontiguousarray(tail) for name, (_, tail) in halves.items()})

    def joined(self, head: Arrays, tail: Arrays) -> Arrays:
        """See `SalientGraphs`."""
        return {name: np.concatenate([head[name], tail[name]], axis=_axis(name)) for name in tail}

    def _nothing(self, feeds: Arrays) -> Arrays:
        """A state of zeros: a step in which all rows are recomputed does not see it."""
        d, tokens, dtype = self.description, feeds["input_ids"].shape[1], feeds["past_key.0"].dtype
        heads = np.zeros((1, d.num_kv_heads, tokens, d.head_dim), dtype)
        wide = {"key": heads, "value": heads, "context": np.zeros((1, tokens, d.num_heads * d.head_dim), dtype),
                "ffn": np.zeros((1, tokens, d.hidden_size), dtype)}
        return {name: wide[name.partition(".")[0]] for name in self._names()}

    def _names(self) -> list[str]:
        return [f"{part}.{layer}" for part in PARTS for layer in range(self.description.num_layers)]


def _axis(name: str) -> int:
    return 2 if name.startswith(("key", "value")) else 1
