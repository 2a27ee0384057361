"""Salient-token steps on the host: what each sequence keeps between steps, and which graph runs (docs/salient.md).

Every sequence runs by itself, so sequences in different phases never share a query range. A sequence keeps key, value,
attention context and feed-forward output of a range of tokens in two parts, head and tail: a step covers both, or the
tail alone against the frozen head. A full-canvas model has its prompt in the head and its response in the tail; a
block-diffusion model has no head, its tail is the active block, and what is frozen lies in the ordinary cache. Where
these numbers lie is the graphs' affair: in host arrays (salient_host.py), or on a device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ..bundle.graph_entries import GraphEntry
from ..bundle.reader import Bundle
from ..description import ModelDescription
from ..errors import RequestError
from .backend import Bools, Cache, ForwardInputs, ForwardOutputs, Ints
from .candidates import Candidates

PARTS = ("key", "value", "context", "ffn")  # per layer; tokens are axis 2 of the first two, axis 1 of the others
Arrays = dict[str, Any]  # by the graphs' names, `token_ids` …

GraphName = int | Literal["any", "fill"]
"""Rows that a layer of the graph recomputes: M, as many as are salient, or all of them."""


@dataclass(frozen=True)
class Past:
    """What a step sees and does not change."""

    positions: Ints  # [1, S]
    cached: Any = None  # one row of the backend's cache, as `Cache.part` gives it
    head: Any = None  # or the state of a range, of whose keys and values these are the positions


class SalientGraphs(Protocol):
    """The salient graphs of a bundle, ready to run, and the states they leave: of B = 1 sequence, T tokens."""

    description: ModelDescription
    capacity: int | None  # as asked for
    capacities: tuple[int, ...]  # M of each graph of fixed shapes, ascending; none: counts come from the data

    def run(self, graph: GraphName, feeds: Arrays, past: Past, old: Any, settings: dict[str, float | int],
            want_logits: bool, candidates: int) -> tuple[Arrays, Any]:
        """What the host wants, as arrays that are the caller's, and the new state; logits only if they are wanted.

        `feeds`: host arrays `input_ids`, `position_ids`, `logit_rows`; `unmasked` and `threshold` unless the graph is
        `fill`. `old`: the state before; None where all rows are recomputed. `candidates`: how many of each place are
        wanted, as `Candidates` of that name; 0: none.
        """
        ...

    def cut(self, state: Any, at: int) -> tuple[Any, Any]:
        """Two states, of the tokens before and from `at`."""
        ...

    def joined(self, head: Any, tail: Any) -> Any:
        """One state of the tokens of both."""
        ...


@runtime_checkable
class SalientBackend(Protocol):
    """A backend that can open the salient graphs of its bundle."""

    def salient_graphs(self, capacity: int | None) -> SalientGraphs:
        """Raises RequestError where the bundle, or the backend, has no such graph."""
        ...


@runtime_checkable
class WatchesSteps(Protocol):
    """Salient graphs whose owner wants to know what a step of all sequences used."""

    def step_ends(self, inputs: ForwardInputs, expert_ids: NDArray[np.int32]) -> None:
        """`expert_ids` [L, B, T, k], −1 = none: also what took no part."""
        ...


@dataclass(frozen=True)
class SalientStep:
    """How a sequence takes part in a step."""

    threshold: float  # τ
    split: int  # position at which the tail begins
    dense: bool  # recompute everything, and fill what the next steps start from
    exact_entry: bool = False  # all rows enter layer 0, not only those whose token changed


@dataclass(frozen=True)
class _State:
    start: int  # position of the head's first token; the tail's where there is no head
    split: int
    ids: Ints  # tokens of the range as the last step over them saw them
    head: Any  # None: there is none
    tail: Any
    need: int | None  # most rows of a layer in the last sparse step; None: there was none


@dataclass(frozen=True)
class SalientResult:
    """What one sequence's step recomputed."""

    salient: Bools | None  # [L, T] rows below the threshold; None = a dense step
    overflowed: bool  # more rows than the capacity: the step was repeated densely


class SalientSteps:
    """Runs steps and keeps the state of each sequence, by a key of the caller's."""

    def __init__(self, graphs: SalientGraphs) -> None:
        self._graphs = graphs
        self._states: dict[int, _State] = {}

    def forget(self, key: int) -> None:
        """A sequence has ended."""
        self._states.pop(key, None)

    def forward(self, inputs: ForwardInputs, cache: Cache, places: list[int], keys: list[int],
                steps: list[SalientStep | None]) -> tuple[ForwardOutputs, list[SalientResult | None]]:
        """One step of the sequences with a `SalientStep`, against their rows of a cache, which lie at `places`.

        Where one fails, no sequence has changed.
        """
        rows, tokens = inputs.input_ids.shape
        asked = inputs.logit_rows.shape[1]
        d = self._graphs.description
        k = d.moe.experts_per_token if d.moe else 0
        out = ForwardOutputs(np.zeros((rows, asked), np.int64), np.zeros((rows, asked), np.float32),
                             np.full((len(d.moe_layers), rows, tokens, k), -1, np.int32),
                             np.zeros((rows, asked, d.vocab_size), np.float32) if inputs.want_logits else None, None,
                             _no_candidates(rows, asked, inputs.candidates) if inputs.candidates else None)
        results: list[SalientResult | None] = [None] * rows
        states: dict[int, _State] = {}
        for i, step in enumerate(steps):
            if step is None:
                continue
            got, results[i], states[keys[i]] = self._row(inputs, cache, places[i], i, keys[i], step)
            m, t = got["token_ids"].shape[1], int((inputs.position_ids[i] >= 0).sum())
            out.token_ids[i, :m], out.confidence[i, :m] = got["token_ids"][0], got["confidence"][0]
            if k:
                out.expert_ids[:, i, :t] = got["expert_ids"][:, 0]
            if out.logits is not None:
                out.logits[i, :m] = got["logits"][0]
            if out.candidates is not None:
                out.candidates.token_ids[i, :m] = got["candidates"].token_ids[0]
                out.candidates.logits[i, :m] = got["candidates"].logits[0]
                out.candidates.mask_logits[i, :m] = got["candidates"].mask_logits[0]
        if isinstance(self._graphs, WatchesSteps):
            self._graphs.step_ends(inputs, out.expert_ids)
        self._states |= states
        return out, results

    def _row(self, inputs: ForwardInputs, cache: Cache, place: int, i: int, key: int, step: SalientStep
             ) -> tuple[Arrays, SalientResult, _State]:
        valid = inputs.position_ids[i] >= 0
        ids, positions = inputs.input_ids[i:i + 1, valid], inputs.position_ids[i:i + 1, valid]
        wanted = inputs.logit_rows[i:i + 1, :max(1, int((inputs.logit_rows[i] >= 0).sum()))]
        feeds: Arrays = {"input_ids": ids, "position_ids": positions, "logit_rows": wanted}
        start, stop = int(positions[0, 0]), int(positions[0, -1]) + 1
        state = self._states.get(key)
        if state is not None and (step.split != state.split or start not in (state.start, state.split)
                                  or stop != state.start + len(state.ids)):
            state = None  # another block
        if state is not None and start == state.split:
            past = self._past(cache, place) if state.head is None else Past(
                np.arange(state.start, state.split)[None], head=state.head)
            got, tail, result, need = self._run(feeds, past, state, True, step, inputs)
            seen = np.append(state.ids[:state.split - state.start], ids[0])
            return got, result, replace(state, ids=seen, tail=tail, need=need)
        got, whole, result, need = self._run(feeds, self._past(cache, place), state, False, step, inputs)
        head, tail = self._graphs.cut(whole, step.split - start) if step.split > start else (None, whole)
        return got, result, _State(start, step.split, ids[0], head, tail, need)

    @staticmethod
    def _past(cache: Cache, place: int) -> Past:
        part = cache.part([place])
        return Past(part.positions, cached=part)

    def _run(self, feeds: Arrays, past: Past, state: _State | None, tail_only: bool, step: SalientStep,
             inputs: ForwardInputs) -> tuple[Arrays, Any, SalientResult, int | None]:
        """A sparse step; a dense one where asked for, without a state, and where no capacity is large enough.

        Outputs, the new state of the range, what it recomputed, and the need to remember.
        """
        ids, options = feeds["input_ids"], (inputs.settings, inputs.want_logits, inputs.candidates)
        need, overflowed = state.need if state else None, False
        if state is not None and not step.dense:
            unmasked = ids != state.ids[-ids.shape[1]:]
            if step.exact_entry:
                unmasked = np.ones_like(unmasked)
            entering = int(unmasked.sum())
            graph = self._sparse_graph(entering, need, ids.shape[1])
            overflowed = graph is None
            if graph is not None:
                old = state.tail if tail_only or state.head is None else self._graphs.joined(state.head, state.tail)
                sparse = {"unmasked": unmasked, "threshold": np.array([step.threshold], np.float32)}
                got, new = self._graphs.run(graph, feeds | sparse, past, old, *options)
                salient = got["salient"][:, 0]
                need = max(entering, int(salient.sum(axis=-1).max()))
                overflowed = isinstance(graph, int) and need > graph
                if not overflowed:
                    return got, new, SalientResult(salient, False), need
                del old, new  # their memory may serve the dense step
        if self._graphs.capacities:
            got, new = self._graphs.run("fill", feeds, past, None, *options)
        else:
            everything = {"unmasked": np.ones_like(ids, bool), "threshold": np.array([2], np.float32)}
            got, new = self._graphs.run("any", feeds | everything, past, None, *options)
        return got, new, SalientResult(None, overflowed), need

    def _sparse_graph(self, entering: int, need: int | None, tokens: int) -> GraphName | None:
        """The smallest capacity with twice the room of the last step's need, the largest where none has, or none is
        known; None where not even the rows that enter fit.

        Rows that only fill a graph are routed to no expert, so room costs little; without it the step is repeated.
        """
        if not self._graphs.capacities:
            return "any"
        usable = [m for m in self._graphs.capacities if entering <= m <= tokens]  # a range has no more rows to list
        roomy = [m for m in usable if need is not None and m >= 2 * need]
        return next(iter(roomy or usable[-1:]), None)


def _no_candidates(rows: int, places: int, count: int) -> Candidates:
    return Candidates(np.full((rows, places, count), -1, np.int32),
                      np.full((rows, places, count), -np.inf, np.float32),
                      np.full((rows, places), -np.inf, np.float32))


def salient_files(bundle: Bundle, capacity: int | None, fixed_only: bool = False) -> dict[GraphName, GraphEntry]:
    """The graphs that serve a capacity: that one and `fill`; None: the one of any count, or with `fixed_only` all
    capacities and `fill`. Raises RequestError where the bundle has none.
    """
    entry = bundle.manifest.salient
    if entry is None:
        raise RequestError(f"{bundle.folder} has no salient graph; export it with --salient, or leave "
                           "salient_threshold out.")
    if capacity is None and not fixed_only:
        return {"any": entry.graph}
    fixed: dict[GraphName, GraphEntry] = {e.capacity: e.graph for e in sorted(entry.fixed, key=lambda e: e.capacity)
                                          if capacity in (None, e.capacity)}
    if not fixed or entry.fill is None:
        known = (f"has graphs for {', '.join(str(e.capacity) for e in entry.fixed)}" if entry.fixed
                 else "has none of fixed capacity")
        wanted = f"for capacity {capacity}" if capacity else "whose sizes a GPU could know beforehand"
        raise RequestError(f"{bundle.folder} has no salient graph {wanted}, it {known}; export it with "
                           f"--salient-capacity {capacity or 16}.")
    return {**fixed, "fill": entry.fill}
