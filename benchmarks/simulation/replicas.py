"""Real replicas: server processes behind the simulation's rule, under clients or arrivals at random."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from dmoe_export.bench.serve_load import Answered, Asked, Counts, Server
from dmoe_export.errors import CheckError

from .fleet import Route, choose
from .load import Arrived, arrival_times


class Replicas(Server):
    """Several servers as one: a request goes to the one with the fewest that have no answer yet."""

    def __init__(self, servers: Sequence[Server], route: Route = "least", seed: int = 0) -> None:
        self._servers, self._route, self._rng = list(servers), route, np.random.default_rng(seed)
        self._ongoing, self._choosing = [0] * len(servers), threading.Lock()
        self._looks: list[tuple[int, float]] = []  # steps and their seconds, at every look

    @property
    def step_seconds(self) -> float:
        """Of a step of the last load, mean, as the servers' metrics tell."""
        (steps, seconds), (more, longer) = self._looks[-2:]
        return (longer - seconds) / (more - steps)

    def arrive(self, asked: Sequence[Asked], rate: float, seed: int) -> Arrived:
        """Every request once, at the times of `arrival_times`; all answers are seen. Raises CheckError for none."""
        answers = [Answered(number, 0.0) for number in range(len(asked))]
        failures, never = list[str](), threading.Event()

        def send(number: int, at: float) -> None:
            time.sleep(max(0.0, at - time.perf_counter()))
            try:
                self._ask(asked[number], answers[number], never)
            except Exception as error:
                failures.append(f"{type(error).__name__}: {error}")

        self._counts()
        start = time.perf_counter() + 0.1
        threads = [threading.Thread(target=send, args=(number, start + at))
                   for number, at in enumerate(arrival_times(len(asked), rate, seed))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures or not all(answer.ended for answer in answers):
            raise CheckError(f"A replica did not answer: {(failures or ['an answer that ends early'])[0]}.")
        self._counts()
        return Arrived(answers, start, np.inf)

    def _counts(self) -> Counts:
        each = [one._counts() for one in self._servers]
        spent = [re.search(r"^dmoe_step_seconds_sum\{.*\} (\S+)$", one._metrics(), re.MULTILINE)
                 for one in self._servers]
        self._looks.append((sum(one.steps for one in each), sum(float(one[1]) for one in spent if one)))
        return Counts(*(sum(getattr(one, name) for one in each) for name in ("steps", "rows", "tokens")))

    def _ask(self, asked: Asked, answer: Answered, over: threading.Event) -> None:
        with self._choosing:
            place = choose(self._ongoing, self._route, self._rng)
            self._ongoing[place] += 1
        try:
            self._servers[place]._ask(asked, answer, over)
        finally:
            with self._choosing:
                self._ongoing[place] -= 1

    def _wait_until_idle(self) -> None:
        for one in self._servers:
            one._wait_until_idle()


@contextmanager
def busy(server: Server, asked: Sequence[Asked], clients: int) -> Iterator[None]:
    """So many clients all the time; raises CheckError where the server failed them."""
    over, failures = threading.Event(), list[CheckError]()

    def keep() -> None:
        try:
            while not over.is_set():
                server.bear(asked, clients)
        except CheckError as error:
            failures.append(error)

    thread = threading.Thread(target=keep)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    if failures:
        raise failures[0]
