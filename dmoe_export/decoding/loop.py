"""Iterative denoising of a batch, each row at its own block: a cache policy plans, one forward runs, rows take results.

Sources: reference loops of LLaDA2.X, dMoE and Fast-dLLM, with the corrections of spec decoding.md ("What the references
get wrong").
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..description import Precision
from ..errors import RequestError
from ..runtime.backend import Backend, Cache, ForwardInputs, Ints, Limits
from ..runtime.salient import SalientBackend, SalientGraphs, SalientSteps
from .caching import Plan, Widths, policy
from .limits import check_forwards
from .outcome import Outcome, asked_places
from .routing import routing_inputs
from .row import FinishReason, Row
from .salient import policy as salient_policy
from .settings import DecodeSettings
from .telemetry import Statistics

Ends = Callable[[int, list[int], bool], int | None]
"""Prompt, new tokens of its finished block, whether it is the last → how many of them stay, or None: all, and go on."""

PREFILL_TOKENS = 512  # most tokens of a row in one prefill forward; chunks are exact under block-causal attention


@dataclass(frozen=True)
class BlockDecoded:
    """A finished block of one sequence; `finish_reason` is set on the last."""

    index: int
    token_ids: list[int]
    finish_reason: FinishReason | None
    statistics: Statistics


class BlockDiffusion:
    """Decodes a batch of prompts; iterate to get finished blocks as they come."""

    def __init__(self, backend: Backend, settings: DecodeSettings, bytes_per_expert: int = 0,
                 precision: Precision | None = None, bundle: str = "BUNDLE") -> None:
        """`bytes_per_expert` is for statistics, `precision` and `bundle` (its place) for the advice of errors.

        Raises RequestError for settings that make no sense with the backend's model.
        """
        self._backend, self._settings, self._bytes = backend, settings, bytes_per_expert
        self._bundle = bundle
        self._routing = routing_inputs(settings, backend.routing.mode, backend.description.moe)
        vocabulary = backend.description.vocab_size
        beyond = next((i for i in settings.eos_ids or () if i >= vocabulary), None)
        if beyond is not None:
            raise RequestError(f"eos_id {beyond} is outside the vocabulary 0 … {vocabulary - 1}.")
        bundled = backend.routing.block_length
        n = self._n = settings.block_length or bundled
        if n != bundled and backend.description.attention == "block_causal":
            raise RequestError(f"block_length {n} differs from the bundle's {bundled}; attention, routing and decoding "
                               "share one grid, so export with --block-length to change it.")
        limits = backend.limits or Limits()
        limit = limits.max_tokens
        if limit is not None and limit < n:
            raise RequestError(f"The engine takes at most {limit} tokens in one forward, a block has {n}; build "
                               f"one with: dmoe-export build {bundle} --max-prefill {n}.")
        chunk = max(1, min(PREFILL_TOKENS, limit or PREFILL_TOKENS) // n) * n
        merged = settings.schedule == "merged"
        widths = Widths(chunk, (limit or chunk + n) * merged, (limits.step_tokens or limit or 2 * n) * merged)
        self._graphs: SalientGraphs | None = None
        if settings.salient_threshold is None:
            self._plan_of = policy(backend.description, settings.cache, widths)
        else:
            self._plan_of = salient_policy(backend.description, settings, widths)
            if not isinstance(backend, SalientBackend):
                raise RequestError(f"Backend {backend.name} runs no salient steps; use backend onnxruntime, or leave "
                                   "salient_threshold out.")
            self._graphs = backend.salient_graphs(settings.salient_capacity)
        self._outcome = Outcome(settings, backend.description.mask_id, precision)

    def check(self, prompts: Sequence[Sequence[int]]) -> None:
        """Raise RequestError when so many prompts, or the forwards they take, are more than the backend takes."""
        check_forwards(prompts, self._settings, self._backend, self._n, self._bundle)

    def decode(self, prompts: Sequence[Sequence[int]], cancelled: Callable[[], bool] = lambda: False,
               ends: Ends | None = None) -> Iterator[BlockDecoded]:
        """Prompts of token ids (not empty) → finished blocks; a row's result does not depend on its neighbours.

        Between forwards it looks at the time limit and asks `cancelled`: then every row that is left ends with the
        blocks it has. `ends` may end a row with "stop"; it is asked once for every block, before that is yielded.

        Raises RequestError as `check` does, and NotFiniteError where a row's numbers are NaN or infinite: the whole
        call ends there, for rows share their forwards; blocks that came before stay.
        """
        self.check(prompts)
        live = [Row(i, list(p), self._settings, self._backend.description, self._n, self._bytes)
                for i, p in enumerate(prompts)]
        cache = self._backend.new_cache(len(live))
        salient = SalientSteps(self._graphs) if self._graphs else None
        over = time.monotonic() + (self._settings.time_limit or math.inf)
        while live:
            stopped = cancelled()
            if stopped or time.monotonic() >= over:
                for row in live:
                    row.interrupt("cancelled" if stopped else "timeout")
            else:
                self._step(live, cache, salient)
            for row in live:
                if row.finish_reason or (row.settled and row.emitted < min(row.span.stop, row.end)):
                    yield _finished(row, ends)
                if row.finish_reason and salient:
                    salient.forget(row.index)
            staying = [i for i, row in enumerate(live) if row.finish_reason is None]
            if len(staying) < len(live):
                live = [live[i] for i in staying]
                if live:
                    cache.keep(staying)

    def _step(self, rows: list[Row], cache: Cache, salient: SalientSteps | None) -> None:
        """One forward: of the rows whose turn it is, each with what its cache policy asks for."""
        plans = _turn([self._plan(row) for row in rows])
        cleared = [i for i, plan in enumerate(plans) if plan is not None and plan.clear]
        if cleared:
            cache.clear(cleared)
        asked = [asked_places(row) if plan is not None and plan.decodes else np.zeros(0, np.int64)
                 for row, plan in zip(rows, plans, strict=True)]
        inputs = self._inputs(rows, plans, asked)
        start = time.perf_counter()
        steps = [plan.salient if plan else None for plan in plans]
        if salient and any(steps):
            outputs, recomputed = salient.forward(inputs, cache, [row.index for row in rows], steps)
        else:
            outputs, recomputed = self._backend.forward(inputs, cache), [None] * len(rows)
        seconds = time.perf_counter() - start
        take = np.zeros(inputs.input_ids.shape, bool)
        for i, (row, plan) in enumerate(zip(rows, plans, strict=True)):
            if plan is None:
                continue
            row.statistics.record(plan.phase, outputs.expert_ids[:, i], seconds, plan.rides, plan.ridden)
            row.statistics.record_salient(recomputed[i])
            changed = plan.decodes and self._outcome.apply(row, asked[i], outputs, i)
            if plan.clear:
                row.cached = 0
            if plan.commit is not None and not (plan.if_unchanged and changed):
                take[i, :len(plan.commit)] = plan.commit
                row.cached += int(plan.commit.sum())
        if take.any():
            cache.commit(inputs, outputs, take)

    def _plan(self, row: Row) -> Plan:
        plan = self._plan_of(row)
        if plan is None:
            row.advance()
            plan = self._plan_of(row)
        assert plan is not None, "a fresh block asks for a forward"
        return plan

    def _inputs(self, rows: list[Row], plans: list[Plan | None], asked: list[Ints]) -> ForwardInputs:
        """The planned queries of all rows, padded at position −1; `asked`: places whose prediction is wanted."""
        width = max(plan.width for plan in plans if plan is not None)
        ids = np.zeros((len(rows), width), np.int64)
        positions = np.full((len(rows), width), -1, np.int64)
        wanted = np.full((len(rows), max(1, *(len(places) for places in asked))), -1, np.int64)
        for i, (row, plan) in enumerate(zip(rows, plans, strict=True)):
            if plan is not None:
                ids[i, :plan.width] = row.canvas[plan.start:plan.stop]
                positions[i, :plan.width] = np.arange(plan.start, plan.stop)
                wanted[i, :len(asked[i])] = asked[i] + row.span.start - row.shift - plan.start
        return ForwardInputs(
            ids, positions, wanted, self._routing,
            want_logits=self._outcome.needs_logits and bool((wanted >= 0).any()),
            want_keys_values=any(plan is not None and plan.commit is not None for plan in plans))


def _finished(row: Row, ends: Ends | None) -> BlockDecoded:
    """What a row has new, up to where `ends` ends it."""
    tokens = row.take_new()
    kept = ends(row.index, tokens, row.finish_reason is not None) if ends else None
    if kept is not None:
        row.stop(len(tokens) - kept)
        tokens = tokens[:kept]
    return BlockDecoded(row.index, tokens, row.finish_reason, row.statistics)


def _turn(plans: list[Plan]) -> list[Plan | None]:
    """Whose turn it is: prefills first, then steps of blocks, full forwards when all rows have come to one.

    A forward is as wide as its widest row, so rows wait for each other where waiting saves a wide forward.
    """
    for phases in (("prefill",), ("denoise", "commit"), ("full",)):
        turn = [plan if plan.apart().phase in phases else None for plan in plans]
        if any(turn):
            break
    exact = any(plan is not None and plan.salient is None for plan in turn)  # a commit does not mix with a step
    return _riding([None if plan and exact and plan.salient else plan for plan in turn])


def _riding(plans: list[Plan | None]) -> list[Plan | None]:
    """Forwards ride along where that makes the batch's forward no wider, or where at least half of its rows want it.

    Else they come first, as forwards of their own: padding of many rows would cost more than one row's forward.
    """
    mine = [plan for plan in plans if plan is not None]
    narrow = max(plan.apart().width for plan in mine)
    many = 2 * sum(plan.rides is not None for plan in mine) >= len(mine)
    return [plan if plan is None or many or plan.width <= narrow else plan.apart() for plan in plans]
