"""The load of `bench serve` and those who bear it: a server process with clients, and this process without one."""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from ..bundle.reader import Bundle
from ..decoding.answer import Block
from ..errors import CheckError
from ..generator import Generator
from .workload import random_prompt

_START_SECONDS = 600.0  # in which a server opens its bundle
_IDLE_SECONDS = 60.0  # in which it frees the rows of clients that left
_ADDRESS = re.compile(r"serving on (http://\S+)")


@dataclass(frozen=True)
class Asked:
    """A request."""

    prompt: list[int]
    options: dict[str, Any]


@dataclass
class Answered:
    """What came of one request; seconds are counted from when it was sent."""

    number: int  # in the load
    sent: float  # by time.perf_counter
    blocks: list[tuple[float, list[int]]] = field(default_factory=list)  # arrival by time.perf_counter, tokens
    ended: bool = False

    @property
    def token_ids(self) -> list[int]:
        """Of all blocks."""
        return [token for _, tokens in self.blocks for token in tokens]

    @property
    def first_block(self) -> float:
        """Seconds to the first block."""
        return self.blocks[0][0] - self.sent

    @property
    def seconds(self) -> float:
        """Seconds to the last block."""
        return self.blocks[-1][0] - self.sent


@dataclass(frozen=True)
class Counts:
    """What a batch did: its steps, each a forward; rows in it, summed over steps; tokens of finished blocks."""

    steps: int
    rows: int
    tokens: int

    def since(self, start: Counts) -> Counts:
        """What came after `start`."""
        return Counts(self.steps - start.steps, self.rows - start.rows, self.tokens - start.tokens)


@dataclass(frozen=True)
class Borne:
    """A load that was borne until all its requests were answered."""

    answers: list[Answered]  # those that ended in it
    tokens: int  # that arrived in it, those of answers that had not ended included
    seconds: float
    counts: Counts

    @property
    def tokens_per_second(self) -> float:
        """Of answers."""
        return self.tokens / self.seconds


def load(bundle: Bundle, requests: int, prompt_tokens: tuple[int, int], new_tokens: tuple[int, int],
         steps: tuple[int, int], seed: int) -> list[Asked]:
    """Random prompts; lengths of prompts and answers, and steps of a block, are drawn evenly between two numbers."""
    rng = np.random.default_rng(seed)
    drawn = [rng.integers(low, high + 1, requests) for low, high in (prompt_tokens, new_tokens, steps)]
    return [Asked(random_prompt(bundle, int(length), seed + 1 + i), {
        "max_new_tokens": int(answer), "steps": int(forwards), "eos_id": -1, "temperature": 0.0})
        for i, (length, answer, forwards) in enumerate(zip(*drawn, strict=True))]


def in_batches(generator: Generator, asked: Sequence[Asked], size: int) -> Borne:
    """Closed batches: the next `size` requests begin when all of the former have ended; rows leave as they end.

    As with a server, a client sends its next request when it has its answer, and then waits for the next batch.
    """
    answers: list[Answered] = []
    start = time.perf_counter()
    sent, steps, held, tokens = [start] * size, 0, 0, 0
    for first in range(0, len(asked), size):
        batch, rows = generator.batch(slots=size), {}
        for number, one in enumerate(asked[first:first + size], first):
            rows[batch.add(generator.request(one.prompt, **one.options))] = Answered(number, sent[number - first])
        while len(batch):
            steps, held = steps + 1, held + len(batch)
            for event in batch.step():
                if event.error:
                    raise event.error
                assert event.block is not None
                _arrived(rows[event.handle], event.block)
                tokens += len(event.block.token_ids)
        sent[:len(rows)] = [answer.blocks[-1][0] for answer in rows.values()]
        answers += rows.values()
    return _borne(answers, start, Counts(steps, held, tokens))


def _arrived(answer: Answered, block: Block) -> None:
    answer.blocks.append((time.perf_counter(), block.token_ids))
    answer.ended = block.finish_reason is not None


def _borne(answers: list[Answered], start: float, counts: Counts) -> Borne:
    """Until the last of `answers` that ended."""
    over = max(answer.blocks[-1][0] for answer in answers if answer.ended)
    arrived = [len(tokens) for answer in answers for at, tokens in answer.blocks if at <= over]
    return Borne([answer for answer in answers if answer.ended], sum(arrived), over - start, counts)


class Server:
    """`dmoe-export serve` in a process of its own."""

    def __init__(self, address: str) -> None:
        parts = urlsplit(address)
        self._place, self.model = (str(parts.hostname), parts.port), "bench"

    def bear(self, asked: Sequence[Asked], clients: int) -> Borne:
        """So many clients, each with one request at a time, until as many have ended as the load has.

        A client that has an answer takes the next request, from the load's beginning again after its end, so that the
        server is as busy at the end as before; what then still runs is left. Raises CheckError for an answer that is
        none.
        """
        answers, failures = list[Answered](), list[str]()
        over, lock = threading.Event(), threading.Lock()
        ended, before = 0, self._counts()
        after = before

        def client() -> None:
            nonlocal ended, after
            try:
                while not over.is_set():
                    with lock:
                        answer = Answered(len(answers) % len(asked), time.perf_counter())
                        answers.append(answer)
                    self._ask(asked[answer.number], answer, over)
                    with lock:
                        ended += answer.ended
                        if ended >= len(asked) and not over.is_set():
                            over.set()
                            after = self._counts()
            except Exception as error:
                failures.append(f"{type(error).__name__}: {error}")
                over.set()

        start = time.perf_counter()
        threads = [threading.Thread(target=client) for _ in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise CheckError(f"The server did not answer a request of the load: {failures[0]}.")
        self._wait_until_idle()
        return _borne(answers, start, after.since(before))

    def _counts(self) -> Counts:
        """Of the server since it began."""
        text = self._metrics()

        def number(name: str) -> int:
            found = re.search(rf"^{name}\{{.*\}} ([0-9.e+]+)$", text, re.MULTILINE)
            return int(float(found[1])) if found else 0

        return Counts(number("dmoe_step_rows_count"), number("dmoe_step_rows_sum"),
                      number("dmoe_committed_tokens_total"))

    def _metrics(self) -> str:
        connection = http.client.HTTPConnection(*self._place, timeout=10)
        try:
            connection.request("GET", "/metrics")
            return connection.getresponse().read().decode()
        finally:
            connection.close()

    def _ask(self, asked: Asked, answer: Answered, over: threading.Event) -> None:
        connection = http.client.HTTPConnection(*self._place, timeout=_START_SECONDS)
        try:
            body = json.dumps({"model": self.model, "prompt": asked.prompt, "stream": True, **asked.options})
            answer.sent = time.perf_counter()
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise RuntimeError(f"status {response.status}, {response.read(500).decode(errors='replace')}")
            for line in response:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(event["error"]["message"])
                if over.is_set():
                    return
                choice = event["choices"][0]
                answer.blocks.append((time.perf_counter(), choice["token_ids"]))
                if choice["finish_reason"]:
                    answer.ended = True
                    return
        finally:
            connection.close()

    def _wait_until_idle(self) -> None:
        """Rows of clients that left are freed at the next step; the next load must not share forwards with them."""
        over = time.monotonic() + _IDLE_SECONDS
        while time.monotonic() < over:
            if re.search(r"^dmoe_requests_in_progress\{.*\} 0\.0$", self._metrics(), re.MULTILINE):
                return
            time.sleep(0.02)
        raise CheckError("The server still has requests in progress, long after its clients have left.")


@contextmanager
def server(folder: Path, options: Sequence[str]) -> Iterator[Server]:
    """A server of one bundle, called "bench", on a free port; raises CheckError where it does not come up."""
    command = [sys.executable, "-m", "dmoe_export", "serve", str(folder), "--name", "bench", "--port", "0", "--verify",
               "sizes", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield Server(_address(process))
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()


def _address(process: subprocess.Popen[str]) -> str:
    """From what it says on standard error, which is then read on and thrown away: a full pipe would stop it."""
    assert process.stderr
    said: list[str] = []
    timer = threading.Timer(_START_SECONDS, process.kill)
    timer.start()
    try:
        for line in process.stderr:
            said.append(line.strip())
            if found := _ADDRESS.search(line):
                _thread(process.stderr.read)
                return found[1]
    finally:
        timer.cancel()
    raise CheckError(f"The server of the benchmark did not start: {(said or ['it said nothing'])[-1]}")


def _thread(work: Callable[[], Any]) -> None:
    threading.Thread(target=work, daemon=True).start()
