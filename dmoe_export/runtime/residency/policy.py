"""Which experts stay on the fast tier: hit counters, refresh every few steps, the interval solver (TIDE).

Source: TIDE (arXiv 2605.20179), spec expert_residency.md. Pure: what "fast" and "slow" are, and how weights get from
one to the other, is a `Tier` (memory and disk: mapped_experts.py). Routing never changes, so tokens never change.
Symbols: L MoE layers, E experts, B fast places per layer, τ interval, d share of experts that change per step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ..backend import Bools, Ints

Interval = int | Literal["auto", "never"]
HORIZON = 64  # longest interval the solver considers, in denoise steps
_MEMORY = 0.8  # weight of the past in the running mean of d and m0


@dataclass(frozen=True)
class Costs:
    """Seconds per expert: C_io to bring it to the fast tier, C_slow to serve one use of it from the slow tier."""

    bring: float
    miss: float
    refresh: float = 0.0  # of a refresh that moves nothing, per resident; the spec leaves it out


@dataclass(frozen=True)
class Move:
    """One layer's change at a refresh: bring[i] takes the place of evict[i]; −1 is a place nobody has yet."""

    layer: int  # index among the MoE layers
    bring: Ints  # [m]
    evict: Ints  # [m]


class Tier(Protocol):
    """The two places an expert can be in. The slow one keeps every expert, so evicting is an edit of a table."""

    def check(self) -> None:
        """Raise when the slow tier is no longer what was opened."""
        ...

    def forward_begins(self) -> None:
        """A forward is about to read experts of any layer."""
        ...

    def forward_ends(self) -> None:
        """It has ended, or failed."""
        ...

    def move(self, moves: list[Move]) -> None:
        """Change the residents; copies may still be on their way when this returns, a use before is then a miss."""
        ...

    def costs(self) -> Costs:
        """Measured on this machine; may take a moment on the first call."""
        ...

    def figures(self) -> dict[str, float]:
        """Running totals, for the statistics: bytes and seconds."""
        ...

    def close(self) -> None:
        """Let go; the weights stay usable."""
        ...


def interval_costs(change: float, floor: float, costs: Costs, horizon: int = HORIZON) -> NDArray[np.float64]:
    """Cost per step and resident of τ = 1 … horizon; `change` is d, `floor` m0 (misses right after a refresh / B).

    C_io/τ·[1−(1−d)^τ] + C_slow·(m0 + 1/τ·Σ_{j<τ}[1−(1−d)^j]): the spec's sum divided by the constants T and B. Its
    slope has the sign of C_slow − d·C_io at every τ, so by itself it knows only the ends: refresh at every step, or
    never. A cost of refreshing as such, C_refresh/τ, is what makes an interval between them best.
    """
    tau = np.arange(1, horizon + 1)
    drifted = 1 - (1 - change) ** np.arange(horizon + 1)  # share changed j steps after a refresh
    return (costs.refresh + costs.bring * drifted[1:]) / tau + costs.miss * (floor + np.cumsum(drifted[:-1]) / tau)


def solve_interval(change: float, floor: float, costs: Costs, horizon: int = HORIZON) -> int:
    """The τ of least cost; among equals the longest, which moves least."""
    values = interval_costs(change, floor, costs, horizon)
    return int(np.flatnonzero(values <= values.min() * (1 + 1e-12))[-1]) + 1


class Residency:
    """Hit counters and residents of every MoE layer; tells what to move and when."""

    def __init__(self, layers: int, experts: int, slots: int, interval: Interval = "auto",
                 warm_start: bool = True) -> None:
        """`slots` is B (0 = nothing is ever resident); `warm_start` refreshes after the first step of every block."""
        self.slots, self.interval, self.warm_start = min(slots, experts), interval, warm_start
        self.resident: Bools = np.zeros((layers, experts), bool)
        self.hits = np.zeros((layers, experts), np.int64)  # tokens per expert; halved at every refresh
        self.tau = 1 if interval == "auto" else interval if isinstance(interval, int) else 0
        self.change: float | None = None  # d, running mean
        self.floor = 0.0  # m0, running mean
        self.refreshes = self.promotions = self.evictions = self.used_fast = self.used_slow = self.steps = 0
        self._since = 0  # denoise steps since the last refresh
        self._due = True  # the first forward fills the empty places
        self._before: Bools | None = None  # experts of the last denoise step

    def observe(self, expert_ids: NDArray[np.int32], is_step: bool, new_block: bool = False) -> None:
        """Count one forward's ids [L, …, k] (−1 = none). Only denoise steps (`is_step`) count towards the interval."""
        layers, experts = self.hits.shape
        flat = expert_ids.reshape(layers, -1)
        counts = np.stack([np.bincount(row[row >= 0], minlength=experts) for row in flat])
        active = counts > 0
        self.hits += counts
        self.used_fast += int((active & self.resident).sum())
        self.used_slow += int((active & ~self.resident).sum())
        if not is_step:
            return
        self.steps += 1
        self._since += 1
        self._measure(active, new_block)
        starts = new_block and self.warm_start
        self._due |= self.interval != "never" and (starts or self._since >= self.tau)

    def _measure(self, active: Bools, new_block: bool) -> None:
        """Running means of d and m0; a new block's first step says nothing about neighbouring steps."""
        used = np.maximum(active.sum(axis=1), 1)
        floor = float(np.maximum(used - self.slots, 0).mean()) / max(self.slots, 1)
        if self._before is not None and not new_block:
            change = float(((active & ~self._before).sum(axis=1) / used).mean())
            first = self.change is None
            self.change = change if first else _MEMORY * (self.change or 0) + (1 - _MEMORY) * change
            self.floor = floor if first else _MEMORY * self.floor + (1 - _MEMORY) * floor
        self._before = active

    @property
    def wants_costs(self) -> bool:
        """Whether the next refresh solves for the interval."""
        return self._due and self.interval == "auto" and self.change is not None and self.slots > 0

    def refresh(self, costs: Costs | None = None) -> list[Move]:
        """What to move now: nothing unless a refresh is due. `costs` for the interval solver, when it `wants_costs`."""
        if not self._due:
            return []
        if self.interval == "auto" and costs is not None and self.change is not None:
            self.tau = solve_interval(self.change, self.floor, costs)
        self._due, self._since = False, 0
        moves = [move for layer in range(len(self.hits)) if (move := self._refresh_layer(layer)) is not None]
        self.refreshes += 1
        self.hits >>= 1  # the past fades
        return moves

    def _refresh_layer(self, layer: int) -> Move | None:
        """Afterwards the residents are the B experts with the most hits; of equals who is there stays, then low ids."""
        hits, resident = self.hits[layer], self.resident[layer]
        order = np.lexsort((np.arange(len(hits)), ~resident, -hits))
        best = order[:self.slots]
        best = best[resident[best] | (hits[best] > 0)]  # nobody is brought in without a hit
        bring = best[~resident[best]]
        free = self.slots - int(resident.sum())
        leave = order[::-1][resident[order[::-1]]][:max(0, len(bring) - free)]  # fewest hits first
        if not len(bring):
            return None
        resident[leave], resident[bring] = False, True
        self.promotions += len(bring)
        self.evictions += len(leave)
        return Move(layer, bring, np.append(np.full(len(bring) - len(leave), -1, np.int64), leave))
