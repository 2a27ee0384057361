"""What a user of a deployment asks: how fast, how long, how busy, at what price."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import Field

from dmoe_export.bench.serve import Times
from dmoe_export.bench.serve_load import Borne
from dmoe_export.description import Frozen
from dmoe_export.errors import RequestError

from .fleet import Fleet, Route
from .load import Arrived, Range, arrivals, clients, drawn
from .steps import StepTimes

_KEPT_UP = 0.95  # share of the tokens asked for in the window that were answered in it


class Case(Frozen):
    """A deployment and its load; `rate` or `clients`, the other is null."""

    replicas: int = Field(gt=0)
    slots: int = Field(gt=0, description="rows of a replica's batch")
    route: Route = "least"
    rate: float | None = Field(None, gt=0, description="requests a second of all replicas, at random")
    clients: int | None = Field(None, gt=0, description="each with one request at a time")
    requests: int = Field(gt=0)
    prompt_tokens: Range = Field(description="drawn evenly between these, as the next two")
    new_tokens: Range
    steps: Range = Field(description="of a block, one number for each request")
    most_ongoing: int | None = Field(None, gt=0, description="requests of a replica; beyond, they are refused")
    price_per_hour: float | None = Field(None, gt=0, description="of a replica, in whatever money")
    seed: int = 0

    @property
    def load(self) -> str:
        """In words."""
        return f"{self.rate:g}/s" if self.rate else f"{self.clients} clients"


class Figures(Frozen):
    """Of one case; seconds of requests count from their arrival."""

    tokens_per_second: float = Field(description="of answers, all replicas")
    first_block: Times
    answer: Times
    utilisation: float = Field(description="share of the time in which a replica runs a step: mean over replicas")
    rows_per_step: float
    tokens_per_step: float = Field(description="of all rows")
    kept_up: bool = Field(description="no request was refused, and of the tokens asked for in the window at least "
                          f"{_KEPT_UP:.0%} were answered in it; else times grow with the number of requests")
    refused: int
    host_milliseconds: float = Field(description="of a step, that the batch took around its forward where this was "
                                     "simulated: processor time, which measured steps have in them and predicted not")
    replica_hours_per_million_tokens: float
    cost_per_million_tokens: float | None = Field(description="in the money of price_per_hour")


def simulate(times: StepTimes, case: Case) -> Figures:
    """One case; raises RequestError where so few requests arrive so fast that none is answered in the window."""
    fleet = Fleet(times, case.replicas, case.slots, case.route, case.most_ongoing, case.seed)
    asked = drawn(case.requests, case.prompt_tokens, case.new_tokens, case.steps, case.seed)
    if case.rate is None:
        assert case.clients is not None, "a case has a rate or clients"
        return _of_clients(fleet, clients(fleet, asked, case.clients), case)
    found = arrivals(fleet, asked, case.rate, case.seed + 1)
    window = found.stop - found.start
    wanted = sum(asked[answer.number].options["max_new_tokens"] for answer in found.seen)
    given = sum(len(tokens) for answer in found.answers for at, tokens in answer.blocks
                if found.start <= at < found.stop)
    if not given:
        raise RequestError(f"{case.requests} requests at {case.rate:g} a second arrive before any of them is answered; "
                           "give more --requests or smaller --rates.")
    kept_up = not fleet.refused and given >= _KEPT_UP * wanted
    return _figures(fleet, found, given / window, (found.start, found.stop), kept_up, case)


def _of_clients(fleet: Fleet, borne: Borne, case: Case) -> Figures:
    return _figures(fleet, borne, borne.tokens_per_second, (0.0, borne.seconds), not fleet.refused, case)


def _figures(fleet: Fleet, found: Arrived | Borne, rate: float, window: tuple[float, float], kept_up: bool,
             case: Case) -> Figures:
    answers = found.seen if isinstance(found, Arrived) else found.answers
    hours = case.replicas / (3600 * rate) * 1e6
    counts = [member.counts for member in fleet.members]
    steps = sum(one.steps for one in counts)
    return Figures(
        tokens_per_second=rate, first_block=Times.of(answer.first_block for answer in answers),
        answer=Times.of(answer.seconds for answer in answers),
        utilisation=float(np.mean([_busy(member.busy, *window) for member in fleet.members])),
        rows_per_step=sum(one.rows for one in counts) / steps,
        tokens_per_step=sum(one.tokens for one in counts) / steps,
        host_milliseconds=1e3 * sum(member.host for member in fleet.members) / steps,
        kept_up=kept_up, refused=fleet.refused, replica_hours_per_million_tokens=hours,
        cost_per_million_tokens=None if case.price_per_hour is None else hours * case.price_per_hour)


def _busy(steps: Sequence[tuple[float, float]], start: float, stop: float) -> float:
    """Share of the window that lies in steps."""
    if not steps:
        return 0.0
    inside = np.clip(np.array(steps), start, stop)
    return float((inside[:, 1] - inside[:, 0]).sum() / (stop - start))
