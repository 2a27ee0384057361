"""A backend under an expert budget: the residency policy around every forward."""

from __future__ import annotations

import re
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from numbers import Integral
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ...errors import RequestError
from ..backend import Backend, ForwardInputs, ForwardOutputs, closed
from ..library import Kernels
from ..salient import Arrays, GraphName, Past, SalientBackend, SalientGraphs
from .budget import ExpertBudget
from .policy import Costs, Interval, Residency, Tier

Result = TypeVar("Result")
_REMEMBERED = 1024  # sequences whose block is known; more than any batch has rows


@dataclass(frozen=True)
class ResidencyStatistics:
    """What residency did; an expert is used once per layer and forward, however many tokens it serves."""

    budget_bytes: int
    residents_per_layer: int
    interval: str  # as asked for
    last_interval: int  # in force at the end; 0 = never
    change_per_step: float | None  # d as measured
    hits: int
    misses: int
    refreshes: int
    promotions: int
    evictions: int
    bring_cost: float | None  # C_io, seconds per expert as measured for the solver
    miss_cost: float | None  # C_slow
    refresh_cost: float | None  # C_refresh, per resident
    policy_seconds: float  # counting, choosing, and measuring costs once
    brought_bytes: int = 0  # promoted in the background
    missed_bytes: int = 0  # brought because a forward could not go on without
    dropped_bytes: int = 0  # given back because the budget was full
    bring_seconds: float = 0.0
    miss_seconds: float = 0.0
    drop_seconds: float = 0.0
    peak_bytes: int = 0  # of the experts in memory, since the bundle was opened

    def since(self, start: ResidencyStatistics) -> ResidencyStatistics:
        """The same over a stretch of time: running totals become differences."""
        totals = ("hits", "misses", "refreshes", "promotions", "evictions", "policy_seconds", "brought_bytes",
                  "missed_bytes", "dropped_bytes", "bring_seconds", "miss_seconds", "drop_seconds")
        return replace(self, **{name: getattr(self, name) - getattr(start, name) for name in totals})

    @property
    def hit_rate(self) -> float:
        """Hits / uses; 1 when nothing was used."""
        return self.hits / (self.hits + self.misses) if self.hits + self.misses else 1.0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "hit_rate": self.hit_rate}


class ResidentBackend:
    """Another backend, with a residency policy watching its forwards and a tier acting on it. Tokens are the same.

    Requests may come from several threads; their forwards take turns, as one policy and one budget serve all.
    """

    def __init__(self, backend: Backend, residency: Residency, tier: Tier, budget: ExpertBudget) -> None:
        self.name, self.description, self.routing = backend.name, backend.description, backend.routing
        self.limits, self.opens_blocks = backend.limits, backend.opens_blocks
        self._backend, self._residency, self._budget = backend, residency, budget
        self._tier: Tier | None = tier  # None once closed
        self._figures: dict[str, float] = {}  # of the tier, once closed
        self._lock = threading.RLock()
        self._blocks: dict[int, int] = {}  # active block of each sequence at its last denoise step, the latest last
        self._seconds = self._refresh_seconds = 0.0
        self._costs: Costs | None = None
        self._finalizer = weakref.finalize(self, tier.close)
        self._finalizer.atexit = False  # the process takes everything with it, drivers first

    def new_cache(self, rows: int) -> Any:
        """The other backend's cache."""
        for row in [key for key in self._blocks if key < 0]:  # rows that nobody names are others now
            del self._blocks[row]
        return self._backend.new_cache(rows)

    @property
    def kernels(self) -> Kernels:
        """Whose kernels run, where the other backend tells."""
        return getattr(self._backend, "kernels", Kernels([], ""))

    @property
    def products(self) -> str | None:
        """What products the other backend takes, where it tells."""
        return getattr(self._backend, "products", None)

    def salient_graphs(self, capacity: int | None) -> ResidentSalient:
        """The other backend's, under the same budget. Raises RequestError where it has none."""
        assert isinstance(self._backend, SalientBackend)  # as all are that keep a budget
        return ResidentSalient(self, self._backend.salient_graphs(capacity))

    def forward(self, inputs: ForwardInputs, cache: Any) -> ForwardOutputs:
        """Run the denoiser, count what it used, refresh when it is time. Raises as `watched`."""
        with self._lock:
            outputs = self.watched(lambda: self._backend.forward(inputs, cache), lambda out: out.expert_ids)
            self.observe(inputs, outputs.expert_ids)
        return outputs

    def watched(self, run: Callable[[], Result], used: Callable[[Result], NDArray[np.int32]]) -> Result:
        """Run what reads experts, and tell `ran` which: `used` finds their ids [L, …, k] in the result.

        Raises BundleError when the expert file was changed before or while it was read: the result is not returned.
        """
        with self._lock:
            tier = self._live()
            tier.check()
            tier.forward_begins()
            try:
                result = run()
            finally:
                tier.forward_ends()
            tier.check()
            self.ran(used(result))
        return result

    def ran(self, expert_ids: NDArray[np.int32]) -> None:
        """What a forward used, for who counts by forwards; called before anything moves."""

    def observe(self, inputs: ForwardInputs, expert_ids: NDArray[np.int32]) -> None:
        """Count what a forward, or a step of several, used: ids [L, …, k]; refresh when it is time."""
        with self._lock:
            start, tier = time.perf_counter(), self._live()
            self._residency.observe(expert_ids, *self._step(inputs))
            if self._residency.wants_costs:
                r, costs = self._residency, tier.costs()
                each = self._refresh_seconds / max(1, r.refreshes) / (len(r.resident) * r.slots)
                self._costs = replace(costs, refresh=each)
            middle = time.perf_counter()
            moves = self._residency.refresh(self._costs)
            if moves:
                self._refresh_seconds += time.perf_counter() - middle
            self._seconds += time.perf_counter() - start
            tier.move(moves)

    def _step(self, inputs: ForwardInputs) -> tuple[bool, bool]:
        """Whether a forward is a denoise step, and whether it is another block's for at least half of its sequences.

        A denoise step asks for logits; its block is the one of the first place it asks for. Where rows join and leave,
        one of them begins a block at almost every step, and what all of them use together changes little.
        """
        wanted = inputs.logit_rows.max(axis=1) >= 0
        if not wanted.any():
            return False, False
        first = np.where(inputs.logit_rows >= 0, inputs.logit_rows, np.iinfo(np.int64).max).min(axis=1)
        positions = np.take_along_axis(inputs.position_ids, np.where(wanted, first, 0)[:, None], axis=1)[:, 0]
        names = inputs.sequences or range(-1, -1 - len(wanted), -1)
        changed, length = 0, self.description.step_tokens(self.routing)
        for row in np.flatnonzero(wanted).tolist():
            block = int(positions[row]) // length
            changed += self._blocks.pop(names[row], None) != block
            self._blocks[names[row]] = block
        while len(self._blocks) > _REMEMBERED:
            del self._blocks[next(iter(self._blocks))]
        return True, 2 * changed >= int(wanted.sum())

    def _live(self) -> Tier:
        if self._tier is None:
            raise closed(self.name)
        return self._tier

    def statistics(self) -> ResidencyStatistics:
        """Totals since the bundle was opened."""
        r, known = self._residency, {field.name for field in fields(ResidencyStatistics)}
        figures = self._tier.figures() if self._tier else self._figures
        figures = {name: value for name, value in figures.items() if name in known}
        return ResidencyStatistics(
            self._budget.bytes, r.slots, str(r.interval), r.tau, r.change, r.used_fast, r.used_slow, r.refreshes,
            r.promotions, r.evictions, self._costs.bring if self._costs else None,
            self._costs.miss if self._costs else None, self._costs.refresh if self._costs else None, self._seconds,
            **figures)  # type: ignore[arg-type]

    def close(self) -> None:
        """See `Backend`. The tier goes first, so that the other backend gives back all that nobody holds any more."""
        with self._lock:
            if self._tier:
                self._finalizer()
                self._figures, self._tier = self._tier.figures(), None
                self._backend.close()


class ResidentSalient:
    """Salient graphs of another backend (`SalientGraphs`), under a `ResidentBackend`'s budget."""

    def __init__(self, under: ResidentBackend, graphs: SalientGraphs) -> None:
        self.description, self.capacity, self.capacities = graphs.description, graphs.capacity, graphs.capacities
        self._under, self._graphs = under, graphs
        self.cut, self.joined = graphs.cut, graphs.joined

    def run(self, graph: GraphName, feeds: Arrays, past: Past, old: Any, settings: dict[str, float | int],
            want_logits: bool, candidates: int) -> tuple[Arrays, Any]:
        """As the other's; raises as `ResidentBackend.watched`."""
        return self._under.watched(
            lambda: self._graphs.run(graph, feeds, past, old, settings, want_logits, candidates),
            lambda got: got[0]["expert_ids"])

    def step_ends(self, inputs: ForwardInputs, expert_ids: NDArray[np.int32]) -> None:
        """See `WatchesSteps`."""
        self._under.observe(inputs, expert_ids)


def parse_interval(value: str | int) -> Interval:
    """`auto`, `never` or a number of denoise steps; raises RequestError."""
    if value in ("auto", "never"):
        return value  # type: ignore[return-value]
    steps = int(value) if isinstance(value, Integral) or re.fullmatch("[0-9]{1,18}", str(value)) else 0
    if steps < 1:
        raise RequestError(f"Expert refresh interval {value!r} is not known; give auto, never or a number of steps.")
    return steps
