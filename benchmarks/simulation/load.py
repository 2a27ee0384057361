"""Who asks when: clients with one request at a time, or arrivals at random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from dmoe_export.bench.serve_load import Answered, Asked, Borne, Counts

from .fleet import Fleet, Request

Range = tuple[int, int]


def drawn(requests: int, prompt_tokens: Range, new_tokens: Range, steps: Range, seed: int) -> list[Asked]:
    """As `dmoe_export.bench.serve_load.load`, whose lengths these are; prompts are zeros."""
    rng = np.random.default_rng(seed)
    lengths = [rng.integers(low, high + 1, requests) for low, high in (prompt_tokens, new_tokens, steps)]
    return [Asked([0] * int(prompt), {"max_new_tokens": int(answer), "steps": int(forwards), "eos_id": -1,
                                      "temperature": 0.0}) for prompt, answer, forwards in zip(*lengths, strict=True)]


def clients(fleet: Fleet, asked: Sequence[Asked], count: int) -> Borne:
    """So many clients, until as many requests have ended as there are; then what still runs is left.

    As `dmoe_export.bench.serve_load.Server.bear`.
    """
    answers: list[Answered] = []
    ended = 0

    def next_one(now: float) -> None:
        answer = Answered(len(answers) % len(asked), now)
        answers.append(answer)
        fleet.send(Request(asked[answer.number], answer, told))

    def told(now: float) -> None:
        nonlocal ended
        ended += 1
        if ended < len(asked):
            next_one(now)

    for _ in range(count):
        fleet.at(0.0, lambda: next_one(fleet.now))
    fleet.run(lambda: ended >= len(asked))
    arrived = [len(tokens) for answer in answers for _, tokens in answer.blocks]
    return Borne([answer for answer in answers if answer.ended], sum(arrived), fleet.now, counts_of(fleet))


def counts_of(fleet: Fleet) -> Counts:
    """Of all its replicas."""
    each = [member.counts for member in fleet.members]
    return Counts(*(sum(getattr(one, name) for one in each) for name in ("steps", "rows", "tokens")))


@dataclass(frozen=True)
class Arrived:
    """What came of requests that arrived at random."""

    answers: list[Answered]  # of all that were taken, in order of arrival
    start: float  # of the window that is looked at, in seconds
    stop: float

    @property
    def seen(self) -> list[Answered]:
        """Those that arrived in the window."""
        return [answer for answer in self.answers if self.start <= answer.sent < self.stop]


def arrival_times(requests: int, rate: float, seed: int) -> list[float]:
    """Of a Poisson process, in seconds."""
    return np.cumsum(np.random.default_rng(seed).exponential(1 / rate, requests)).tolist()


def arrivals(fleet: Fleet, asked: Sequence[Asked], rate: float, seed: int) -> Arrived:
    """Every request once, `rate` a second at random (Poisson), until all have ended.

    The window leaves out the first and the last tenth of the arrivals: the replicas fill up and run empty there.
    """
    times = arrival_times(len(asked), rate, seed)
    requests = [Request(one, Answered(number, 0.0)) for number, one in enumerate(asked)]
    for time, request in zip(times, requests, strict=True):
        fleet.at(time, partial(fleet.send, request))
    fleet.run()
    edge = len(asked) // 10
    return Arrived([r.answer for r in requests if r.replica >= 0], times[edge], times[-1 - edge])
