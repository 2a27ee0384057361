"""Real Ray Serve on this machine (`make test-ray`): replicas that die, scale, are replaced and cancelled."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import SAMPLE
from ray_cluster import cluster, needs_ray

from dmoe_export.generator import Generator

pytestmark = [pytest.mark.slow, needs_ray, pytest.mark.timeout(240)]
LONG = {"eos_id": -1, "max_tokens": 96}  # three blocks: a replica can be lost between two of them
QUESTIONS = [json.loads(line)["question"] for line in (SAMPLE / "held_out.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def ray():
    with cluster() as made:
        yield made


@pytest.fixture(scope="module")
def arguments(sample_bundle):
    return {"bundle": str(sample_bundle.folder), "name": "sample", "cpus": 0.5, "threads": 1, "health_period": 1,
            "drain_seconds": 20}


@pytest.fixture(scope="module")
def offline(sample_bundle):
    """Token ids and text of the long answer to each of the first questions."""
    with Generator.open(sample_bundle.folder, threads=1) as generator:
        found = generator.generate(QUESTIONS[:100], chat=False, max_new_tokens=LONG["max_tokens"], eos_id=-1)
    return [(one.token_ids, one.text) for one in found]


def body_of(number, **more):
    return {"model": "sample", "prompt": QUESTIONS[number % 100], **LONG, **more}


class Load:
    """Clients that ask one request after the other, every other one as a stream, and hold each to its answer."""

    def __init__(self, ray, path, offline, clients=8, most=None):
        self.rows, self.over = [], threading.Event()
        self._ray, self._path, self._offline, self._most, self._next = ray, path, offline, most, 0
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(clients)
        self._tasks = [self._pool.submit(self._client) for _ in range(clients)]

    def wait(self):
        self._pool.shutdown()
        for task in self._tasks:
            task.result()
        return self.rows

    def end(self):
        self.over.set()
        return self.wait()

    def _client(self):
        while not self.over.is_set():
            with self._lock:
                number, self._next = self._next, self._next + 1
            if self._most is not None and number >= self._most:
                return
            began = time.monotonic()
            status, outcome = self._ask(number)
            self.rows.append({"number": number, "began": began, "seconds": time.monotonic() - began, "status": status,
                              "outcome": outcome})

    def _ask(self, number):
        """(status, "right", or what it was)"""
        stream = number % 2 == 0
        status, said, headers = self._ray.ask(self._path, body_of(number, stream=stream))
        if status != 200:
            return status, said["error"]["code"] if headers.get("retry-after") else said
        if stream:
            events = [json.loads(line[6:]) for line in said.splitlines() if line.startswith("data: {")]
            if "error" in events[-1]:
                return 200, events[-1]["error"]["code"]
            assert said.endswith("data: [DONE]\n\n")
            choices = [event["choices"][0] for event in events]
        else:
            choices = said["choices"]
        ids = [i for choice in choices for i in choice["token_ids"]]
        text = "".join(choice["text"] for choice in choices)
        right = (ids, text) == tuple(self._offline[number % 100]) and choices[-1]["finish_reason"] == "length"
        return status, "right" if right else f"wrong: {ids}"


def percentiles(rows):
    seconds = sorted(row["seconds"] for row in rows)
    return {"requests": len(rows), **{name: round(seconds[min(int(share * len(seconds)), len(seconds) - 1)], 4)
                                      for name, share in (("p50", 0.5), ("p99", 0.99))}} if rows else {"requests": 0}


def test_a_killed_replica_loses_no_request_and_returns(ray, arguments, offline, record_testsuite_property):
    ray.deploy(("sample", {**arguments, "replicas": 2}))
    path = "/sample/v1/completions"
    Load(ray, path, offline, most=16).wait()  # both are warm
    first = ray.processes("sample")
    assert len(first) == 2
    load = Load(ray, path, offline, most=200)
    while len(load.rows) < 80:
        time.sleep(0.005)
    killed = time.monotonic()
    os.kill(first[0], signal.SIGKILL)
    rows = load.wait()
    while len(set(ray.processes("sample")) - {first[0]}) < 2:
        assert time.monotonic() < killed + 60
        time.sleep(0.1)
    back = time.monotonic() - killed
    after = Load(ray, path, offline, most=60).wait()
    outcomes = {row["outcome"] for row in rows}
    assert len(rows) == 200 and outcomes <= {"right", "replica_lost"}, outcomes
    assert {row["outcome"] for row in after} == {"right"}
    assert "a replica of sample was lost" in ray.logs()  # it was in the middle of some
    times = {"before": percentiles([row for row in rows if row["began"] + row["seconds"] < killed]),
             "across": percentiles([row for row in rows if row["began"] <= killed <= row["began"] + row["seconds"]]),
             "one replica": percentiles([row for row in rows if row["began"] > killed]),
             "after": percentiles(after), "seconds until the replica was back": round(back, 1),
             "right": sum(row["outcome"] == "right" for row in rows), "replica_lost": sum(
                 row["outcome"] == "replica_lost" for row in rows)}
    record_testsuite_property("killed replica", json.dumps(times))
    print(json.dumps(times, indent=1))
