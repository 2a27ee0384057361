"""What a forward did to a row's active block, for those who want to see it: provisional, and never an answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .outcome import Chosen
from .row import Row
from .telemetry import Executed, unique_experts


@dataclass(frozen=True)
class StepSeen:
    """The active block after a forward, at its places that belong to the answer; with `edit_blocks` the open ones
    before it, too.

    Lists over places: `token_ids` (−1 = still masked), `candidates` (the best token of a masked place, else its token),
    `confidence` (probability of the candidate as of the forward that last looked at the place; 0 = none has), `new`
    (indices of the places that this forward decided or changed).
    """

    index: int  # of the row
    block: int  # counted from the answer's first
    step: int  # forwards that decoded the block
    start: int  # of the first place in the answer, in tokens
    token_ids: list[int]
    candidates: list[int]
    confidence: list[float]
    new: list[int]
    phase: Executed
    forwards: int  # model forwards of the row so far
    executed_forwards: int
    new_tokens: int  # committed, in finished blocks
    given_tokens: int  # by a template, of the answer up to the last of these places
    unique_experts: list[int]  # of each MoE layer, of this row in this forward
    seconds: float  # of the forward, which other rows may have shared

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


Watch = Callable[[StepSeen], None]


class Watcher:
    """Remembers the confidence of each place of a row's active block, and tells what a forward did."""

    def __init__(self, watch: Watch) -> None:
        self._watch, self._block = watch, -1
        self._candidates = self._confidence = np.zeros(0)

    def see(self, row: Row, chosen: Chosen | None, phase: Executed, expert_ids: NDArray[np.int32],
            seconds: float) -> None:
        """`chosen`: of a forward that decoded; `expert_ids` [L, T, k] of the row."""
        span = row.window
        if row.block != self._block:
            self._block = row.block
            self._candidates = np.full(span.stop - span.start, -1, np.int64)
            self._confidence = np.zeros(span.stop - span.start)
        new: list[int] = []
        if chosen is not None:
            self._candidates[chosen.asked], self._confidence[chosen.asked] = chosen.tokens, chosen.confidence
            new = chosen.changed.tolist()
        first = max(0, row.prompt_length - span.start)
        last = max(first, min(span.stop, row.end) - span.start)
        tokens, masked = row.canvas[span], row.masked[span]
        shown = slice(first, last)
        self._watch(StepSeen(
            row.index, row.block, row.step, span.start + first - row.prompt_length,
            np.where(masked, -1, tokens)[shown].tolist(), np.where(masked, self._candidates, tokens)[shown].tolist(),
            self._confidence[shown].tolist(), [i - first for i in sorted(new) if first <= i < last], phase,
            row.statistics.forwards, row.statistics.executed_forwards, row.statistics.new_tokens,
            int(row.given[:span.start + last].sum()), unique_experts(expert_ids).tolist(), seconds))
