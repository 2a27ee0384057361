"""A server under load: rows that join at any step, against closed batches and one request at a time."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

from pydantic import Field

from ..bundle.reader import Bundle
from ..description import Frozen
from ..errors import RequestError
from ..generator import Generator
from ..runtime.cpu.backend import OnnxRuntimeBackend
from ..runtime.cpu.products import Products
from .record import Spread
from .serve_load import Asked, Borne, Counts, Server, in_batches, load, server


class Times(Frozen):
    """Of the requests of all rounds, in seconds from when each was sent."""

    half: float = Field(description="median")
    most: float = Field(description="95th of 100")
    longest: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Times:
        """Of at least one value."""
        found = sorted(values)
        return cls(half=median(found), most=found[min(len(found) - 1, int(0.95 * len(found)))], longest=found[-1])


class Way(Frozen):
    """One way to answer the load."""

    tokens_per_second: Spread = Field(description="of answers, over rounds")
    tokens_per_step: float = Field(description="of all rows, per step of the batch: median over rounds; what the "
                                   "rate follows where a forward costs the same for few rows and many")
    rows_per_step: float = Field(description="in the batch: median over rounds")
    first_block: Times
    answer: Times


class Gain(Frozen):
    """A ratio of two rates of the same round."""

    median: float
    least: float


class AtClients(Frozen):
    """So many clients, each with one request at a time."""

    clients: int
    joining: Way = Field(description="the server, whose rows join and leave at any step")
    closed: Way = Field(description="Generator.batch: so many requests begin together, the next when all have ended")
    steps_over_closed: Gain = Field(description="tokens per step of joining / of closed")
    over_closed: Gain = Field(description="tokens per second of joining / of closed")
    over_one: Gain = Field(description="tokens per second of joining / of one request at a time by Generator")


class Overhead(Frozen):
    """One client: what the server adds to the same requests, each by Generator and by the server in turns."""

    alone: Way = Field(description="Generator, one request at a time")
    served: Way
    share: float = Field(description="median over requests and rounds of the server's seconds / Generator's - 1")
    share_of_all: float = Field(description="seconds of all requests by the server / by Generator - 1")
    milliseconds: float = Field(description="median over requests and rounds of the difference")


class ServeBench(Frozen):
    """One run."""

    model: str
    layers: int
    precision: str
    routing: str
    products: str | None
    block_length: int
    threads: int
    requests: int
    rounds: int
    prompt_tokens: tuple[int, int] = Field(description="drawn evenly between these")
    new_tokens: tuple[int, int] = Field(description="drawn evenly between these")
    steps: tuple[int, int] = Field(description="that fill a block of an answer, drawn evenly between these")
    slots: int = Field(description="rows of the server's batch")
    cpu_ops: bool = Field(description="weights' products are computed by our CPU kernels")
    differing: int = Field(description="answers, of all ways, with other tokens than the request's alone")
    overhead: Overhead
    results: list[AtClients]


@dataclass(frozen=True)
class _Pair:
    """One request by both."""

    alone: Borne
    served: Borne


def run(bundle: Bundle, *, clients: Sequence[int], requests: int, prompt_tokens: tuple[int, int],
        new_tokens: tuple[int, int], steps: tuple[int, int], rounds: int, threads: int, seed: int,
        cpu_products: Products = "exact",
        advance: Callable[[str, int, int], None] = lambda what, done, of: None) -> ServeBench:
    """Measure; what is compared takes turns, round by round, after a short request that warms up.

    Raises RequestError for a load that the model does not take, CheckError where the server fails.
    """
    manifest = bundle.manifest
    if prompt_tokens[1] + new_tokens[1] > manifest.model.max_positions:
        raise RequestError(f"{prompt_tokens[1]} prompt and {new_tokens[1]} new tokens are more than the model's "
                           f"{manifest.model.max_positions} positions; choose shorter ones.")
    asked = load(bundle, requests, prompt_tokens, new_tokens, steps, seed)
    backend = OnnxRuntimeBackend(bundle, threads, products=cpu_products)
    slots = max(clients)
    options = ["--backend", "onnxruntime", "--threads", str(threads), "--cpu-products", cpu_products, "--max-batch",
               str(slots)]
    joining: dict[int, list[Borne]] = {n: [] for n in clients}
    closed: dict[int, list[Borne]] = {n: [] for n in clients}
    pairs: list[list[_Pair]] = []
    total, done = rounds * (1 + 2 * len(clients)), 0

    def told(what: str) -> None:
        nonlocal done
        advance(what, done, total)
        done += 1

    with Generator(bundle, backend) as generator, server(bundle.folder, options) as served, _frozen():
        warm = [Asked(one.prompt, one.options | {"max_new_tokens": 1}) for one in asked[:slots]]
        in_batches(generator, warm, slots)
        served.bear(warm, slots)
        for turn in range(rounds):
            told("one client, in turns")
            pairs.append([_pair(generator, served, asked, i, bool((i + turn) % 2)) for i in range(len(asked))])
            for n in clients:
                for way in (("joining", "closed") if turn % 2 else ("closed", "joining")):
                    told(f"{way}, {n} at a time")
                    if way == "joining":
                        joining[n].append(served.bear(asked, n))
                    else:
                        closed[n].append(in_batches(generator, asked, n))
    alone = [_one_at_a_time([pair.alone for pair in of_turn]) for of_turn in pairs]
    truth = [pair.alone.answers[0].token_ids for pair in pairs[0]]
    loads = [borne for bornes in (*joining.values(), *closed.values()) for borne in bornes]
    others = [answer for borne in loads for answer in borne.answers]
    others += [borne.answers[0] for of_turn in pairs for pair in of_turn for borne in (pair.alone, pair.served)]
    return ServeBench(
        model=manifest.model.architecture, layers=manifest.model.num_layers, precision=manifest.precision_in_words,
        routing=manifest.routing.mode, products=backend.products, block_length=manifest.step_tokens,
        threads=threads, requests=requests, rounds=rounds, prompt_tokens=prompt_tokens, new_tokens=new_tokens,
        steps=steps, slots=slots, cpu_ops=not backend.kernels.missing,
        differing=sum(answer.token_ids != truth[answer.number] for answer in others),
        overhead=_overhead(pairs, alone), results=[AtClients(
            clients=n, joining=_way(joining[n]), closed=_way(closed[n]),
            steps_over_closed=_gain(joining[n], closed[n], _per_step), over_closed=_gain(joining[n], closed[n]),
            over_one=_gain(joining[n], alone)) for n in clients])


@contextmanager
def _frozen() -> Iterator[None]:
    """What this process holds beside the model, such as an exporter, is not looked through for garbage meanwhile.

    It would be at every so many steps, and the server has none of it: that made this process up to 2.6 times slower.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _pair(generator: Generator, served: Server, asked: Sequence[Asked], number: int, served_first: bool) -> _Pair:
    """One request by both; which comes first changes, so that neither always has the warmer machine."""
    one, found = [asked[number]], dict[bool, Borne]()
    for by_server in (served_first, not served_first):
        borne = served.bear(one, 1) if by_server else in_batches(generator, one, 1)
        borne.answers[0].number = number
        found[by_server] = borne
    return _Pair(found[False], found[True])


def _one_at_a_time(parts: Sequence[Borne]) -> Borne:
    """Single requests as one load; what passed between them does not count."""
    counts = [part.counts for part in parts]
    return Borne([part.answers[0] for part in parts], sum(part.tokens for part in parts),
                 sum(part.answers[0].seconds for part in parts),
                 Counts(*(sum(getattr(one, name) for one in counts) for name in ("steps", "rows", "tokens"))))


def _per_step(borne: Borne) -> float:
    return borne.counts.tokens / borne.counts.steps


def _way(turns: Sequence[Borne]) -> Way:
    answers = [answer for turn in turns for answer in turn.answers]
    return Way(tokens_per_second=Spread.of([turn.tokens_per_second for turn in turns]),
               tokens_per_step=median(map(_per_step, turns)),
               rows_per_step=median(turn.counts.rows / turn.counts.steps for turn in turns),
               first_block=Times.of(answer.first_block for answer in answers),
               answer=Times.of(answer.seconds for answer in answers))


def _gain(ours: Sequence[Borne], theirs: Sequence[Borne], rate: Callable[[Borne], float] | None = None) -> Gain:
    """Of `rate`, or of tokens per second, in the same round."""
    rate = rate or (lambda borne: borne.tokens_per_second)
    ratios = [rate(a) / rate(b) for a, b in zip(ours, theirs, strict=True)]
    return Gain(median=median(ratios), least=min(ratios))


def _overhead(turns: Sequence[Sequence[_Pair]], alone: Sequence[Borne]) -> Overhead:
    pairs = [(pair.served.answers[0].seconds, pair.alone.answers[0].seconds) for turn in turns for pair in turn]
    return Overhead(
        alone=_way(alone), served=_way([_one_at_a_time([pair.served for pair in turn]) for turn in turns]),
        share=median(served / lone for served, lone in pairs) - 1,
        share_of_all=sum(served for served, _ in pairs) / sum(lone for _, lone in pairs) - 1,
        milliseconds=median(1e3 * (served - lone) for served, lone in pairs))
