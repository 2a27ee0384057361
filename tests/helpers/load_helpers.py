"""Clients that ask a server for this and that, leave in the middle or ask nonsense, and what they were told."""

from __future__ import annotations

import http.client
import json
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

MALFORMED = ['{"model": ', '{"model": "sample"}', '{"model": "sample", "messages": []}', "[]", "\xff",
             '{"model": "sample", "messages": [{"role": "user", "content": "x"}], "threshold": "high"}',
             '{"model": "sample", "messages": [{"role": "user", "content": "x"}], "max_tokens": 99999}',
             '{"model": "none", "messages": [{"role": "user", "content": "x"}]}']


@dataclass
class Asked:
    """One request and what came of it."""

    kind: str  # whole, stream, malformed, and those who leave: gone, deleted
    messages: list[dict]
    options: dict
    sent: str
    status: int = 0
    text: str = ""
    finish: str | None = None
    error: object = None


def mixed(random, questions, system, cancelled=0.1, malformed=0.05):
    """One request: answers short and long, with and without chance, half of them after the same system prompt."""
    messages = [{"role": "system", "content": system}] * random.randint(0, 1)
    messages += [{"role": "user", "content": random.choice(questions)}]
    options = {"max_tokens": random.choice([8, 20, 40, 64, 100])}
    options |= random.choice([{}, {}, {"eos_id": -1}, {"threshold": 0.6}, {"cache": "none"}, {"coreset_top_p": 0.9},
                              {"temperature": 0.8, "seed": random.randrange(100)}])
    luck = random.random()
    kind = ("gone" if luck < cancelled / 2 else "deleted" if luck < cancelled else
            "malformed" if luck < cancelled + malformed else random.choice(["whole", "stream"]))
    if kind in ("gone", "deleted"):
        options |= {"max_tokens": 150, "eos_id": -1, "threshold": 1.0}  # long enough to be left in the middle
    body = {"model": "sample", "messages": messages, **options, "stream": kind != "whole"}
    return Asked(kind, messages, options, random.choice(MALFORMED) if kind == "malformed" else json.dumps(body))


def ask(port, asked, timeout=60):
    """Send it and take down the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request("POST", "/v1/chat/completions", asked.sent.encode("latin-1"),
                           {"content-type": "application/json"})
        answer = connection.getresponse()
        asked.status = answer.status
        if answer.status != 200 or asked.kind == "whole":
            whole = json.loads(answer.read())
            asked.error = whole.get("error")
            if answer.status == 200:
                choice = whole["choices"][0]
                asked.text, asked.finish = choice["message"]["content"], choice["finish_reason"]
            return
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            asked.error = asked.error or event.get("error")
            for choice in event.get("choices", []):
                asked.text += choice["delta"]["content"]
                asked.finish = choice["finish_reason"]
            if asked.kind == "gone":
                return
            if asked.kind == "deleted":
                other = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
                other.request("DELETE", f"/v1/requests/{answer.headers['x-request-id']}")
                other.getresponse().read()
                other.close()
    except Exception as error:
        asked.error = error
    finally:
        connection.close()


def load(port, requests, clients):
    """All requests, so many at once; each client takes the next one when it has its answer."""
    waiting, lock = list(reversed(requests)), threading.Lock()

    def client():
        while True:
            with lock:
                if not waiting:
                    return
                mine = waiting.pop()
            ask(port, mine)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@dataclass
class Pulse:
    """Asks /health/live all the time; `slowest` in seconds."""

    port: int
    slowest: float = 0.0
    beats: int = 0
    wrong: list = field(default_factory=list)

    def __enter__(self):
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._end.set()
        self._thread.join()

    def _run(self):
        while not self._end.wait(0.01):
            start = time.monotonic()
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
            try:
                connection.request("GET", "/health/live")
                status = connection.getresponse().status
                if status != 200:
                    self.wrong.append(status)
            except Exception as error:
                self.wrong.append(error)
            finally:
                connection.close()
            self.slowest, self.beats = max(self.slowest, time.monotonic() - start), self.beats + 1


def requests_of(seed, number, questions, system, **shares):
    """So many of `mixed`."""
    random = Random(seed)
    return [mixed(random, questions, system, **shares) for _ in range(number)]


def resident_bytes(pid):
    """Of a process, in memory now."""
    with Path(f"/proc/{pid}/status").open() as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmRSS:"))
