"""Whose forward is next, where rows of a batch want different ones.

Rows share a forward if it is of one kind: the same phase (a prefill, a step, or all that a block can see), the same
routing settings, and the same graph. Usually prefills go first, as they make the steps after them wider; then steps;
forwards over everything come last, for they are as wide as their widest row, so waiting until more rows have come to
one saves wide forwards. But a row waits only so long (`patience`, in forwards); then the kind that has waited longest
is next. So a row waits at most its patience and one forward for every other kind: prefills and steps alternate as soon
as a row that has begun its answer is there, and neither starves.

A backend may say up to which width a forward is as fast as a step (`Limits.step_tokens`; TensorRT's profile of steps).
There prefills do not alternate with steps: cut to that width, they share their forwards.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal

from .caching import Plan

Turn = Literal["prefill", "step", "full"]
_TURNS: dict[str, Turn] = {"prefill": "prefill", "denoise": "step", "commit": "step", "full": "full"}
_ORDER: tuple[Turn, ...] = ("prefill", "step", "full")
PATIENCE = 1  # forwards that a row lets pass while it could share none of them
LONG_PATIENCE = 8  # of rows that gain by waiting for company: for a step as wide as the batch, or a refresh of caches


@dataclass(frozen=True)
class Waiting:
    """A row that wants a forward."""

    plan: Plan
    shares: Hashable  # rows of equal ones may share a forward: routing settings, graph
    waited: int  # forwards since its last
    begun: bool  # it has decided tokens

    @property
    def turn(self) -> Turn:
        """The phase of what must run first: a forward that rides counts by itself."""
        return _TURNS[self.plan.apart().phase]

    @property
    def kind(self) -> tuple[Hashable, ...]:
        """Rows of one kind share a forward; a salient step is one of another graph."""
        return self.turn, self.plan.salient is not None, self.shares

    @property
    def overdue(self) -> bool:
        """Whether it has waited as long as it may."""
        gains = (self.turn == "full" and self.plan.clear) or (self.turn == "step" and not self.begun)
        return self.waited >= (LONG_PATIENCE if gains else PATIENCE)


def next_forward(rows: list[Waiting], fast: int = 0) -> list[int]:
    """The rows (at least one is given) that take part in the next forward, as indices in order.

    `fast`: most tokens of a row in a forward that is as fast as a step; 0 where every token costs.
    """
    first = max(rows, key=lambda row: (row.overdue, row.waited if row.overdue else -_ORDER.index(row.turn),
                                       -_ORDER.index(row.turn), row.plan.salient is None, row.waited))
    mixed = [i for i, row in enumerate(rows) if row.turn != "full" and row.kind[1:] == first.kind[1:]]
    if fast and first.turn != "full" and any(rows[i].turn == "step" and rows[i].begun for i in mixed):
        return mixed
    return [i for i, row in enumerate(rows) if row.kind == first.kind]


def shaped(plans: list[Plan], block_length: int, fast: int = 0) -> list[Plan]:
    """The plans of one forward, of which prefills beside steps are cut to `fast` tokens, a number of whole blocks.

    Forwards ride along where that makes the batch's forward no slower, or where at least half of its rows want it. Else
    they come first, as forwards of their own: padding of many rows would cost more than one row's forward.
    """
    fast = fast // block_length * block_length
    if fast and len({_TURNS[plan.apart().phase] for plan in plans}) > 1:
        plans = [plan if plan.width <= fast else plan.apart().cut(fast) for plan in plans]
    narrow = max(fast, *(plan.apart().width for plan in plans))
    many = 2 * sum(plan.rides is not None for plan in plans) >= len(plans)
    return [plan if many or plan.width <= narrow else plan.apart() for plan in plans]
