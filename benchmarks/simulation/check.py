"""The simulation against real servers: one replica and two, fed with the steps of one.

In every round, in turns: steps measured without a server, loads on one server; steps measured while a server beside
it is busy, loads on two servers. The two share a processor's caches and memory, which replicas with machines of their
own do not: so two are simulated with both kinds of steps. What the simulation does with its steps is seen apart from
these in a third way: with steps as long, on average, as those of the servers under that very load.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from dmoe_export.bench.serve import Times
from dmoe_export.bench.serve_load import Asked, Borne, Server, load, server
from dmoe_export.description import Frozen
from dmoe_export.generator import Generator
from dmoe_export.runtime.cpu.backend import OnnxRuntimeBackend

from . import ASSUMPTIONS
from .bundle import NAME, small_mixture
from .fleet import Fleet
from .load import Arrived, Range, arrivals, clients
from .measure import Measured
from .replicas import Replicas, busy
from .steps import StepTimes

ONE, TWO = (1, 2, 4), (2, 4, 8)  # clients of one replica, of two
KINDS = {1: ("alone", "scaled"), 2: ("beside", "alone", "scaled")}  # of steps, by replicas
SLOTS = 8
_SHARE = 0.7  # of what two replicas can answer, that arrives at random

_Load = tuple[int, int | None]  # replicas, clients; None: arrivals at random


class Seen(Frozen):
    """Of one load."""

    tokens_per_second: float | None  # null at arrivals: they set it
    tokens_per_step: float | None
    step_seconds: float  # mean
    first_block: Times
    answer: Times

    @classmethod
    def of(cls, found: Borne | Arrived, step_seconds: float) -> Seen:
        """Of a load by clients, or of arrivals."""
        answers = found.answers
        borne = found if isinstance(found, Borne) else None
        return cls(tokens_per_second=borne and borne.tokens_per_second,
                   tokens_per_step=borne and borne.counts.tokens / borne.counts.steps, step_seconds=step_seconds,
                   first_block=Times.of(one.first_block for one in answers),
                   answer=Times.of(one.seconds for one in answers))

    @property
    def values(self) -> dict[str, float]:
        """What is compared."""
        found = {"tokens_per_second": self.tokens_per_second, "tokens_per_step": self.tokens_per_step,
                 "step_seconds": self.step_seconds, "first_block_p50": self.first_block.half,
                 "first_block_p95": self.first_block.most, "answer_p50": self.answer.half,
                 "answer_p95": self.answer.most}
        return {name: value for name, value in found.items() if value is not None}


class Compared(Frozen):
    """One load: a round each."""

    replicas: int
    clients: int | None
    rate: float | None  # requests a second at random, in the first round
    steps: str  # alone or beside: how they were measured; scaled: alone, to the servers' mean under this load
    measured: list[Seen]
    simulated: list[Seen]
    ratios: dict[str, list[float]]  # simulated / measured, by round
    ratio: dict[str, float]  # medians


class Check(Frozen):
    """One run."""

    model: str
    threads: int
    slots: int
    requests: int
    rounds: int
    prompt_tokens: Range
    new_tokens: Range
    steps: Range
    assumptions: tuple[str, ...]
    alone: list[StepTimes]
    beside: list[StepTimes]
    slower_beside: list[float]  # seconds of the same steps beside a busy server / alone, by the two fits
    results: list[Compared]


def check(work: Path, rounds: int, requests: int, prompt_tokens: Range, new_tokens: Range, steps: Range, seed: int,
          minutes: float, advance: Callable[[str], None] = lambda what: None) -> Check:
    """Measure and simulate; no round begins that would not end within `minutes`, were it as long as the one before.

    Raises CheckError where a server fails.
    """
    start = time.monotonic()
    advance("bundle")
    bundle = small_mixture(work)
    asked = load(bundle, requests, prompt_tokens, new_tokens, steps, seed)
    options = ["--backend", "onnxruntime", "--threads", "1", "--max-batch", str(SLOTS)]
    with (Generator(bundle, OnnxRuntimeBackend(bundle, 1)) as generator, server(bundle.folder, options) as first,
          server(bundle.folder, options) as second):
        warm = [Asked(one.prompt, one.options | {"max_new_tokens": 1}) for one in asked[:SLOTS]]
        Replicas([first, second]).bear(warm, SLOTS)
        Measured().add(generator, warm, SLOTS, SLOTS)
        turns, began = list[_Round](), time.monotonic()

        def tell(what: str) -> None:
            advance(f"round {len(turns) + 1} of {rounds}: {what}")

        for number in range(rounds):
            now = time.monotonic()
            if turns and now + (now - began) > start + 60 * minutes:
                break
            began = now
            rate = turns[0].rate if turns else None
            turns.append(_round(generator, [first, second], asked, rate, number, seed, tell))
    return Check(
        model=f"{NAME}, {bundle.manifest.precision_in_words}", threads=1, slots=SLOTS, requests=requests,
        rounds=len(turns),
        prompt_tokens=prompt_tokens, new_tokens=new_tokens, steps=steps, assumptions=ASSUMPTIONS,
        alone=[turn.fits["alone"] for turn in turns], beside=[turn.fits["beside"] for turn in turns],
        slower_beside=[turn.slower for turn in turns],
        results=[_compared(load_of, kind, turns) for load_of in turns[0].real for kind in KINDS[load_of[0]]])


@dataclass
class _Round:
    """What was measured in a round, by replicas and clients (None: at random), and what was simulated of it."""

    rate: float
    fits: dict[str, StepTimes]
    slower: float
    real: dict[_Load, Seen]
    simulated: dict[tuple[_Load, str], Seen]


def _round(generator: Generator, servers: Sequence[Server], asked: Sequence[Asked], rate: float | None, number: int,
           seed: int, advance: Callable[[str], None]) -> _Round:
    """Steps and loads take turns, so that a machine that slows down slows both."""
    real: dict[_Load, Seen] = {}
    measured = {"alone": Measured(), "beside": Measured()}
    few = [asked[(number + i) % len(asked)] for i in range(max(1, len(asked) // 2))]
    one, two = Replicas(servers[:1]), Replicas(servers)
    for n in ONE:
        advance(f"one replica, {n} at a time")
        measured["alone"].add(generator, few, n, SLOTS)
        real[1, n] = Seen.of(one.bear(asked, n), one.step_seconds)
    for n in TWO:
        advance(f"two replicas, {n} at a time")
        with busy(servers[1], asked[:SLOTS], n // 2):
            measured["beside"].add(generator, few, n // 2, SLOTS)
        real[2, n] = Seen.of(two.bear(asked, n), two.step_seconds)
    fits = {kind: found.fitted(generator, f"{NAME}, one thread, {kind}") for kind, found in measured.items()}
    rate = rate or _SHARE * _most(fits["beside"], asked)
    advance(f"two replicas, {rate:.2f} a second at random")
    real[2, None] = Seen.of(two.arrive(asked, rate, seed + number), two.step_seconds)
    simulated = {}
    for load_of in real:
        for kind in KINDS[load_of[0]]:
            times = fits["alone" if kind == "scaled" else kind]
            mine = _simulated(times, asked, load_of, rate, seed + number)
            for _ in range(3 if kind == "scaled" else 0):  # how many rows share a step changes with how long it takes
                times = times.scaled(real[load_of].step_seconds / mine.step_seconds)
                mine = _simulated(times, asked, load_of, rate, seed + number)
            simulated[load_of, kind] = mine
    slower = sum(map(fits["beside"].seconds, measured["alone"].inputs)) / sum(measured["alone"].seconds)
    return _Round(rate, fits, slower, real, simulated)


def _simulated(times: StepTimes, asked: Sequence[Asked], load_of: _Load, rate: float, seed: int) -> Seen:
    replicas, n = load_of
    fleet = Fleet(times, replicas, SLOTS)
    found = clients(fleet, asked, n) if n else arrivals(fleet, asked, rate, seed)
    if isinstance(found, Arrived):
        found = Arrived(found.answers, 0.0, float("inf"))  # all of them, as they are few
    steps = [over - start for member in fleet.members for start, over in member.busy]
    return Seen.of(found, sum(steps) / len(steps))


def _most(times: StepTimes, asked: Sequence[Asked]) -> float:
    """Requests a second of two replicas that always have some to do."""
    borne = clients(Fleet(times, 2, SLOTS), asked, max(TWO))
    return len(borne.answers) / borne.seconds


def _compared(load_of: _Load, kind: str, turns: Sequence[_Round]) -> Compared:
    replicas, n = load_of
    measured, simulated = [turn.real[load_of] for turn in turns], [turn.simulated[load_of, kind] for turn in turns]
    ratios = {name: [mine.values[name] / real.values[name] for mine, real in zip(simulated, measured, strict=True)]
              for name in measured[0].values}
    return Compared(replicas=replicas, clients=n, rate=None if n else turns[0].rate, steps=kind, measured=measured,
                    simulated=simulated, ratios=ratios,
                    ratio={name: median(values) for name, values in ratios.items()})
