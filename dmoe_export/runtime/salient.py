"""Salient-token steps on the host: what each sequence keeps between steps, and which graph runs (docs/salient.md).

Every sequence runs by itself, so sequences in different phases never share a query range. A sequence keeps key, value,
attention context and feed-forward output of a range of tokens in two parts, head and tail: a step covers both, or the
tail alone against the frozen head. A full-canvas model has its prompt in the head and its response in the tail; a
block-diffusion model has no head, its tail is the active block, and what is frozen lies in the ordinary cache.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ..description import ModelDescription
from .backend import Bools, ForwardInputs, ForwardOutputs, Ints

PARTS = ("key", "value", "context", "ffn")  # per layer; tokens are axis 2 of the first two, axis 1 of the others
Arrays = dict[str, Any]  # by the graphs' names, `key.0` …

GraphName = Literal["any", "fixed", "fill"]


class SalientGraphs(Protocol):
    """The salient graphs of a bundle, ready to run."""

    description: ModelDescription
    capacity: int | None  # None: counts come from the data, no `fixed` or `fill` graph is used

    def run(self, graph: GraphName, feeds: Arrays, settings: dict[str, float | int], want_logits: bool) -> Arrays:
        """All outputs but, unless wanted, the logits."""
        ...


@runtime_checkable
class SalientBackend(Protocol):
    """A backend that can open the salient graphs of its bundle."""

    def salient_graphs(self, capacity: int | None) -> SalientGraphs:
        """Raises RequestError where the bundle has no such graph."""
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
    head: Arrays | None
    tail: Arrays


@dataclass(frozen=True)
class SalientResult:
    """What one sequence's step recomputed."""

    salient: Bools | None  # [L, T] rows below the threshold; None = a dense step
    overflowed: bool  # more rows than the capacity: the step was repeated densely


class SalientSteps:
    """Runs steps and keeps the state of each sequence, by a key of the caller's."""

    def __init__(self, graphs: SalientGraphs) -> None:
        self._graphs = graphs
        self._layers = range(graphs.description.num_layers)
        self._states: dict[int, _State] = {}

    def forget(self, key: int) -> None:
        """A sequence has ended."""
        self._states.pop(key, None)

    def forward(self, inputs: ForwardInputs, cache: Any, keys: list[int], steps: list[SalientStep | None]
                ) -> tuple[ForwardOutputs, list[SalientResult | None]]:
        """One step of the sequences with a `SalientStep`, against their rows of a `HostCache`.

        Where one fails, no sequence has changed.
        """
        rows, tokens = inputs.input_ids.shape
        asked = inputs.logit_rows.shape[1]
        d = self._graphs.description
        k = d.moe.experts_per_token if d.moe else 0
        out = ForwardOutputs(np.zeros((rows, asked), np.int64), np.zeros((rows, asked), np.float32),
                             np.full((len(d.moe_layers), rows, tokens, k), -1, np.int32),
                             np.zeros((rows, asked, d.vocab_size), np.float32) if inputs.want_logits else None, None)
        results: list[SalientResult | None] = [None] * rows
        states: dict[int, _State] = {}
        for i, step in enumerate(steps):
            if step is None:
                continue
            got, results[i], states[keys[i]] = self._row(inputs, cache, i, keys[i], step)
            m, t = got["token_ids"].shape[1], int((inputs.position_ids[i] >= 0).sum())
            out.token_ids[i, :m], out.confidence[i, :m] = got["token_ids"][0], got["confidence"][0]
            if k:
                out.expert_ids[:, i, :t] = got["expert_ids"][:, 0]
            if out.logits is not None:
                out.logits[i, :m] = got["logits"][0]
        if isinstance(self._graphs, WatchesSteps):
            self._graphs.step_ends(inputs, out.expert_ids)
        self._states |= states
        return out, results

    def _row(self, inputs: ForwardInputs, cache: Any, i: int, key: int, step: SalientStep
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
        tail_only = state is not None and start == state.split
        if state is not None and tail_only and state.head is not None:
            feeds["past_positions"] = np.arange(state.start, state.split)[None]
            feeds |= {f"past_{name}": state.head[name] for name in self._names("key", "value")}
        else:
            feeds["past_positions"] = cache.positions[i:i + 1]
            for layer in self._layers:
                feeds[f"past_key.{layer}"] = cache.keys[layer][i:i + 1]
                feeds[f"past_value.{layer}"] = cache.values[layer][i:i + 1]
        got, result = self._run(feeds, state, tail_only, step, inputs)
        new = {name: got[name] for name in self._names(*PARTS)}
        if state is not None and tail_only:
            seen = np.append(state.ids[:state.split - state.start], ids[0])
            return got, result, replace(state, ids=seen, tail=new)
        head, tail = _cut(new, step.split - start)
        return got, result, _State(start, step.split, ids[0], head, tail)

    def _run(self, feeds: Arrays, state: _State | None, tail_only: bool, step: SalientStep, inputs: ForwardInputs
             ) -> tuple[Arrays, SalientResult]:
        """A sparse step; a dense one where asked for, without a state, and where the capacity is too small."""
        ids, capacity = feeds["input_ids"], self._graphs.capacity
        options = (inputs.settings, inputs.want_logits)
        overflowed = False
        if state is not None and not step.dense:
            unmasked = ids != state.ids[-ids.shape[1]:]
            if step.exact_entry:
                unmasked = np.ones_like(unmasked)
            old = state.tail if tail_only or state.head is None else _joined(state.head, state.tail)
            sparse = {"unmasked": unmasked, "threshold": np.array([step.threshold], np.float32),
                      **{f"range_{name}": value for name, value in old.items()}}
            overflowed = capacity is not None and not unmasked.sum() <= capacity <= ids.shape[1]
            if not overflowed:
                got = self._graphs.run("any" if capacity is None else "fixed", feeds | sparse, *options)
                salient = got["salient"][:, 0]
                overflowed = capacity is not None and bool(salient.sum(axis=-1).max() > capacity)
                if not overflowed:
                    return got, SalientResult(salient, False)
        if capacity is not None:
            return self._graphs.run("fill", feeds, *options), SalientResult(None, overflowed)
        everything = {"unmasked": np.ones_like(ids, bool), "threshold": np.array([2], np.float32),
                      **self._nothing(feeds)}
        return self._graphs.run("any", feeds | everything, *options), SalientResult(None, overflowed)

    def _nothing(self, feeds: Arrays) -> Arrays:
        """A state of zeros: a step in which all rows are recomputed does not see it."""
        d, tokens, dtype = self._graphs.description, feeds["input_ids"].shape[1], feeds["past_key.0"].dtype
        heads = np.zeros((1, d.num_kv_heads, tokens, d.head_dim), dtype)
        wide = {"key": heads, "value": heads, "context": np.zeros((1, tokens, d.num_heads * d.head_dim), dtype),
                "ffn": np.zeros((1, tokens, d.hidden_size), dtype)}
        return {f"range_{name}": wide[name.partition(".")[0]] for name in self._names(*PARTS)}

    def _names(self, *parts: str) -> list[str]:
        return [f"{part}.{layer}" for part in parts for layer in self._layers]


def _axis(name: str) -> int:
    return 2 if name.startswith(("key", "value")) else 1


def _cut(arrays: Arrays, at: int) -> tuple[Arrays | None, Arrays]:
    """Head and tail; no head where there is nothing in it."""
    if at == 0:
        return None, arrays
    halves = {name: np.split(value, [at], axis=_axis(name)) for name, value in arrays.items()}
    return ({name: np.ascontiguousarray(head) for name, (head, _) in halves.items()},
            {name: np.ascontiguousarray(tail) for name, (_, tail) in halves.items()})


def _joined(head: Arrays, tail: Arrays) -> Arrays:
    return {name: np.concatenate([head[name], tail[name]], axis=_axis(name)) for name in tail}
