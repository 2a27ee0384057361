"""A batch that rows join and leave between forwards; each row has its own settings, and its answer is its own.

Every step is one forward: of the rows whose turn it is (turns.py), each with what its cache policy asks for.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ..description import Precision
from ..errors import RequestError
from ..runtime.backend import Backend, ForwardInputs, ForwardOutputs, Limits
from ..runtime.salient import SalientResult, SalientSteps
from ..words import count
from .caching import Plan
from .inputs import inputs_of
from .limits import check_batch, check_prompt
from .prefixes import RowPrefix, store_of
from .probabilities import Recorder, TokenProbability
from .row import FinishReason, Row
from .settings import DecodeSettings
from .telemetry import Statistics
from .turns import Waiting, next_forward, shaped
from .watch import Watch, Watcher
from .way import Way

Ends = Callable[[list[int], bool], int | None]
"""New tokens of a row's finished block, whether it is the last → how many of them stay, or None: all, and go on."""


_SERIAL = itertools.count()  # of all batches: what counts for several must tell their rows apart


@dataclass(eq=False)
class Handle:
    """A row of a batch, for `JoiningBatch.cancel` and to know its blocks by."""

    row: Row = field(repr=False)
    way: Way = field(repr=False)
    ends: Ends | None = field(repr=False)
    watcher: Watcher | None = field(repr=False)
    recorder: Recorder | None = field(repr=False)
    prefix: RowPrefix | None = field(repr=False)
    over: float  # when its time is over, by time.monotonic
    serial: int
    waited: int = 0  # forwards since its last
    alone: bool = False  # a forward that it shared has failed: who is to blame?
    cancelled: bool = False
    finished: bool = False


@dataclass(frozen=True)
class Decoded:
    """A finished block of a row; `finish_reason` is set on the last. With `error` the row has ended without one."""

    handle: Handle
    token_ids: list[int]
    finish_reason: FinishReason | None
    statistics: Statistics
    error: Exception | None = None
    probabilities: list[TokenProbability] | None = None  # of the tokens, where they are asked for


class JoiningBatch:
    """Decodes up to `slots` rows together. One thread uses it; only `cancel` may be called from others."""

    def __init__(self, backend: Backend, slots: int, bytes_per_expert: int = 0, precision: Precision | None = None,
                 bundle: str = "BUNDLE", prefix_cache: str | int | None = None) -> None:
        """`bytes_per_expert` is for statistics, `precision` and `bundle` (its place) for the advice of errors.

        `prefix_cache`: bytes for blocks of prompts and answers that later prompts may begin with; None keeps none.
        Raises RequestError for more slots than an engine takes rows, and as `store_of`.
        """
        if slots < 1:
            raise RequestError(f"slots is {slots}, it must be at least 1.")
        check_batch(slots, backend, bundle)
        self.slots = slots
        self._backend, self._bytes, self._precision, self._bundle = backend, bytes_per_expert, precision, bundle
        self._fast = (backend.limits or Limits()).step_tokens or 0
        self._grid = 1 if backend.description.canvas else backend.routing.block_length
        self._cache = backend.new_cache(slots)
        self.prefixes = store_of(backend, self._cache, prefix_cache) if prefix_cache is not None else None
        self._rows: list[Handle] = []  # row i of the cache is the row's
        self._salient: dict[int | None, SalientSteps] = {}  # by the capacity of their graphs

    def __len__(self) -> int:
        """Rows in it."""
        return len(self._rows)

    @property
    def free(self) -> int:
        """Rows that may still join."""
        return self.slots - len(self._rows)

    def way(self, settings: DecodeSettings) -> Way:
        """See `Way`."""
        return Way(self._backend, settings, self._precision, self._bundle)

    def add(self, prompt: list[int], settings: DecodeSettings | Way, index: int = 0, ends: Ends | None = None,
            watch: Watch | None = None) -> Handle:
        """A row joins; it takes part in forwards from the next step on.

        `index`: counts rows of one request, for errors; the row draws with seed + index. `ends` may end the row with
        "stop"; it is asked once for every block. `watch` sees each forward of the row.
        Raises RequestError where no slot is free, for what makes no sense with the model, and as `check_prompt`.
        """
        if not self.free:
            raise RequestError(f"All {count(self.slots, 'slot')} of the batch are taken; wait until a row has left.")
        way = settings if isinstance(settings, Way) else self.way(settings)
        check_prompt(prompt, way, self._backend, self._bundle, index)
        row = Row(index, list(prompt), way.settings, self._backend.description, way.block_length, self._bytes,
                  way.template, way.complete)
        prefix = RowPrefix(self.prefixes, way, self._backend) if self.prefixes and way.caches_blocks else None
        top = way.settings.logprobs
        recorder = None if top is None else Recorder(row, top, self._backend.description.barred_id)
        handle = Handle(row, way, ends, Watcher(watch) if watch else None, recorder, prefix,
                        time.monotonic() + (way.settings.time_limit or math.inf), next(_SERIAL))
        self._rows.append(handle)
        return handle

    def cancel(self, handle: Handle) -> None:
        """The row ends at the next step, with the blocks it has; nothing happens where it has ended already."""
        handle.cancelled = True

    def step(self) -> list[Decoded]:
        """One forward, if a row is there: the blocks that it finished, and rows that end at this look between forwards.

        A forward that fails with several rows in it is repeated row by row, and the row that fails by itself ends with
        the error, as does one whose numbers are NaN or infinite: the others do not notice.
        """
        done: list[Decoded] = []
        now = time.monotonic()
        for handle in self._rows:
            if handle.cancelled or now >= handle.over:
                handle.row.interrupt("cancelled" if handle.cancelled else "timeout")
                done.append(self._finished(handle))
        if not done and self._rows:
            done = self._forward()
        self._let_go()
        return done

    def _forward(self) -> list[Decoded]:
        failed = self._take_prefixes()
        if failed:
            return failed
        plans = [handle.way.plan(handle.row) for handle in self._rows]
        waiting = [self._waiting(*pair) for pair in zip(self._rows, plans, strict=True)]
        turn = next_forward(waiting, self._fast)
        for i, handle in enumerate(self._rows):
            handle.waited = 0 if i in turn else handle.waited + 1  # who waits for another's blocks has its turn, too
        chosen = self._once(turn)
        mine = [self._rows[i] for i in chosen]
        return self._run(chosen, mine, shaped([plans[i] for i in chosen], self._grid, self._fast))

    def _take_prefixes(self) -> list[Decoded]:
        """Rows take what is kept of their prompts; those that could not."""
        failed = []
        for place, handle in enumerate(self._rows):
            try:
                if handle.prefix:
                    handle.prefix.take(handle.row, self._cache, place)
            except Exception as error:  # of the row's cache, such as no memory
                failed.append(_failed(handle, error))
        return failed

    def _once(self, chosen: list[int]) -> list[int]:
        """Without rows whose next blocks an earlier one computes: they take them from the store at the next step."""
        common: list[object] = []
        for i in chosen:
            handle = self._rows[i]
            common.append((handle.prefix and handle.prefix.common(handle.row)) or handle)
        return [i for number, i in enumerate(chosen) if common[number] not in common[:number]]

    def _waiting(self, handle: Handle, plan: Plan) -> Waiting:
        graphs = handle.way.graphs
        shares = (tuple(sorted(handle.way.routing.items())), graphs.capacity if plan.salient and graphs else None,
                  handle.serial if handle.alone else None)
        return Waiting(plan, shares, handle.waited, bool(handle.row.step or handle.row.block))

    def _run(self, places: list[int], handles: list[Handle], plans: list[Plan]) -> list[Decoded]:
        """One forward of these rows, which lie at these places of the cache."""
        cleared = [place for place, plan in zip(places, plans, strict=True) if plan.clear]
        if cleared:
            self._cache.clear(cleared)
            for handle, plan in zip(handles, plans, strict=True):
                if plan.clear:
                    handle.row.cached = 0
        asked = [handle.way.outcome.asked(handle.row) if plan.decodes else np.zeros(0, np.int64)
                 for handle, plan in zip(handles, plans, strict=True)]
        inputs = inputs_of(self._backend.description, [handle.row for handle in handles],
                           [handle.way for handle in handles], plans, asked,
                           tuple(handle.serial for handle in handles))
        start = time.perf_counter()
        try:
            outputs, recomputed = self._compute(inputs, places, handles, plans)
        except Exception as error:  # no row has changed
            if len(handles) == 1:
                return [_failed(handles[0], error)]
            for handle in handles:
                handle.alone = True
            return []
        seconds = time.perf_counter() - start
        take = np.zeros(inputs.input_ids.shape, bool)
        failed: dict[int, Exception] = {}
        for i, (handle, plan) in enumerate(zip(handles, plans, strict=True)):
            row, chosen = handle.row, None
            handle.alone = False
            ran = row.statistics.record(plan.phase, outputs.expert_ids[:, i], seconds, plan.rides, plan.ridden)
            row.statistics.record_salient(recomputed[i])
            if plan.decodes:
                masked = row.masked[row.window].copy() if handle.recorder else None
                try:
                    chosen = handle.way.outcome.apply(row, asked[i], outputs, i)
                    if handle.recorder and masked is not None:
                        handle.recorder.see(row, masked, asked[i], chosen, outputs, i)
                except Exception as error:  # of this row's numbers
                    failed[i] = error
                    continue
            if plan.commit is not None and not (plan.if_unchanged and chosen is not None and len(chosen.changed)):
                take[i, :len(plan.commit)] = plan.commit
                row.cached += int(plan.commit.sum())
            if handle.watcher:
                try:
                    handle.watcher.see(row, chosen, ran, outputs.expert_ids[:, i, :plan.width], seconds)
                except Exception as error:  # of who watches
                    failed[i] = error
        if take.any():
            try:
                self._cache.commit(inputs, outputs, take, places)
            except Exception as error:  # rows have changed, so what they lack now cannot be made up
                failed |= {i: error for i in np.flatnonzero(take.any(axis=1)).tolist()}
        for i, (handle, place) in enumerate(zip(handles, places, strict=True)):
            if handle.prefix and i not in failed:
                try:
                    handle.prefix.keep(handle.row, self._cache, place)
                except Exception as error:
                    failed[i] = error
        return [done for i, handle in enumerate(handles)
                for done in ([_failed(handle, failed[i])] if i in failed else self._finished_block(handle))]

    def _compute(self, inputs: ForwardInputs, places: list[int], handles: list[Handle],
                 plans: list[Plan]) -> tuple[ForwardOutputs, list[SalientResult | None]]:
        graphs = handles[0].way.graphs
        if plans[0].salient is None or graphs is None:
            return self._backend.forward(inputs, self._cache.part(places)), [None] * len(handles)
        salient = self._salient.setdefault(graphs.capacity, SalientSteps(graphs))
        return salient.forward(inputs, self._cache, places, [handle.serial for handle in handles],
                               [plan.salient for plan in plans])

    def _finished_block(self, handle: Handle) -> list[Decoded]:
        """What the row has new, if that is a block or the end."""
        row = handle.row
        if row.finish_reason or (row.settled and row.emitted < min(row.final, row.end)):
            return [self._finished(handle)]
        return []

    def _finished(self, handle: Handle) -> Decoded:
        """What a row has new, up to where `ends` ends it."""
        row, start = handle.row, handle.row.emitted
        tokens = row.take_new()
        try:
            said = handle.recorder.take(row, start, tokens) if handle.recorder else None
            kept = handle.ends(tokens, row.finish_reason is not None) if handle.ends else None
        except Exception as error:  # of the caller's text
            return _failed(handle, error)
        if kept is not None:
            row.stop(len(tokens) - kept)
            tokens = tokens[:kept]
        handle.finished = row.finish_reason is not None
        return Decoded(handle, tokens, row.finish_reason, row.statistics, probabilities=said and said[:len(tokens)])

    def _let_go(self) -> None:
        """Rows that have ended leave; the last row takes the place of each."""
        for place in reversed(range(len(self._rows))):
            handle = self._rows[place]
            if handle.finished:
                self._cache.leave(place, len(self._rows) - 1)
                last = self._rows.pop()
                if last is not handle:
                    self._rows[place] = last
                if handle.way.graphs is not None and handle.way.graphs.capacity in self._salient:
                    self._salient[handle.way.graphs.capacity].forget(handle.serial)


def _failed(handle: Handle, error: Exception) -> Decoded:
    handle.finished = True
    return Decoded(handle, [], None, handle.row.statistics, error)
