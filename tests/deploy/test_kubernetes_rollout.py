"""A rolling update as Kubernetes does it, played with processes of this machine: no request of OpenAI's client fails.

Beside the servers there is a stand-in for a Service: it chooses a replica per connection and never ends one.
"""

from __future__ import annotations

import socket
import threading
import time
from contextlib import ExitStack, contextmanager

import openai
import pytest
from serving import serving

from dmoe_export.generator import Generator

QUESTIONS = ["what is 2 plus 3?", "reverse the list 3 1 4 7.", "what is the capital of france?", "sort the list 5 2 9."]
LEAVING = 1.0  # seconds between leaving the Service and SIGTERM; of the manifest, 10


class Service:
    """Connections to one address, each to the next of the ready replicas."""

    def __init__(self):
        self.replicas, self._turn = [], 0
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/v1"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                client = self._socket.accept()[0]
            except OSError:
                return
            replica = self.replicas[self._turn % len(self.replicas)]
            self._turn += 1
            server = socket.create_connection(("127.0.0.1", replica.port))
            for one, other in ((client, server), (server, client)):
                threading.Thread(target=_carry, args=(one, other), daemon=True).start()

    def close(self):
        self._socket.close()


def _carry(one, other):
    """Bytes of one direction, until its end."""
    try:
        while data := one.recv(1 << 16):
            other.sendall(data)
        other.shutdown(socket.SHUT_WR)
    except OSError:
        for end in (one, other):
            end.close()


class Clients:
    """Threads that ask without a pause, each over connections that it keeps."""

    def __init__(self, url, wanted, number=4):
        self.url, self.wanted, self.right, self.failed, self.stop = url, wanted, 0, [], threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._ask, args=(one,)) for one in range(number)]

    def _ask(self, number):
        client = openai.OpenAI(base_url=self.url, api_key="none", timeout=60)  # its own two retries
        turn = number
        while not self.stop.is_set():
            question, turn = QUESTIONS[turn % len(QUESTIONS)], turn + 1
            try:
                got = _answer(client, question, stream=turn % 2 == 0)
            except Exception as error:
                got = repr(error)
            with self._lock:
                self.right += got == self.wanted[question]
                if got != self.wanted[question]:
                    self.failed.append(got)

    def __enter__(self):
        for one in self._threads:
            one.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        for one in self._threads:
            one.join(60)
        assert not any(one.is_alive() for one in self._threads)

    def more(self, answers):
        """Wait for so many right answers more."""
        until, end = self.right + answers, time.monotonic() + 60
        while self.right < until and time.monotonic() < end:
            time.sleep(0.02)
        assert self.right >= until


def _answer(client, question, stream):
    asked = client.chat.completions.create(model="sample", messages=[{"role": "user", "content": question}],
                                           max_tokens=64, stream=stream)
    if not stream:
        return asked.choices[0].message.content
    return "".join(event.choices[0].delta.content or "" for event in asked if event.choices)


def hold(replica, ended):
    """A request of many seconds, so that the replica drains for as long."""
    body = {"model": "sample", "prompt": "what", "n": 4, "temperature": 1.0, "max_tokens": 400, "eos_id": -1,
            "threshold": 1.0}
    start = time.monotonic()
    status, _, answer = replica.ask("POST", "/v1/completions", body, timeout=120)
    ended.append((status, {one["finish_reason"] for one in answer["choices"]}, time.monotonic() - start))


@contextmanager
def replica(bundle, service):
    """One that the Service knows as soon as it is ready."""
    with serving(bundle.folder, "--name", "sample", "--threads", 1, "--timeout", 60, "--drain-seconds", 60) as one:
        assert one.ask("GET", "/health/ready")[0] == 200
        service.replicas.append(one)
        yield one


@pytest.mark.slow
def test_a_rolling_update_fails_no_request(sample_bundle):
    with Generator.open(sample_bundle.folder, threads=1) as offline:
        wanted = {question: offline.generate(question, max_new_tokens=64)[0].text for question in QUESTIONS}
    service, held = Service(), []
    with ExitStack() as running:
        old = [running.enter_context(replica(sample_bundle, service)) for _ in range(2)]
        with Clients(service.url, wanted) as clients:
            clients.more(20)
            for leaving in old:  # maxSurge 1, maxUnavailable 0: a new one is ready before an old one leaves
                new = running.enter_context(replica(sample_bundle, service))
                holding = threading.Thread(target=hold, args=(leaving, held))
                holding.start()
                service.replicas.remove(leaving)
                time.sleep(LEAVING)  # the preStop hook
                leaving.process.terminate()
                assert leaving.process.wait(70) == 0
                holding.join(10)
                clients.more(20)
                assert new.process.poll() is None
        service.close()
        print(f"{clients.right} right, {len(clients.failed)} failed, held: {held}")
        assert not clients.failed and clients.right > 60
        assert [one[:2] for one in held] == [(200, {"length"})] * 2
