"""Real Ray Serve on this machine (`make test-ray`): replicas that die, scale, are replaced and cancelled."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import SAMPLE
from openai import OpenAI
from ray_cluster import BIN, REPOSITORY, ask, cluster, environment, needs_ray
from ray_cluster import end as end_process
from serving import free_port

from dmoe_export.cli import main
from dmoe_export.generator import Generator

pytestmark = [pytest.mark.slow, needs_ray, pytest.mark.timeout(240)]
RESULTS = REPOSITORY / "out" / "ray"
LONG = {"eos_id": -1, "max_tokens": 96}  # three blocks: a replica can be lost between two of them
LOST = "a replica of sample was lost"  # in the log of an ingress
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
    """Token ids of each of the first questions in the chat template, and token ids and text of its long answer."""
    with Generator.open(sample_bundle.folder, threads=1) as generator:
        asked = [generator.request(one).token_ids for one in QUESTIONS[:100]]
        found = generator.generate(asked, max_new_tokens=LONG["max_tokens"], eos_id=-1)
    return [(ids, one.token_ids, one.text) for ids, one in zip(asked, found, strict=True)]


def body_of(prompt, **more):
    return {"model": "sample", "prompt": prompt, **LONG, **more}


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
        status, said, headers = self._ray.ask(self._path, body_of(self._offline[number % 100][0], stream=stream))
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
        right = (ids, text) == self._offline[number % 100][1:] and choices[-1]["finish_reason"] == "length"
        return status, "right" if right else f"wrong: {ids}"


def percentiles(rows):
    seconds = sorted(row["seconds"] for row in rows)
    return {"requests": len(rows), **{name: round(seconds[min(int(share * len(seconds)), len(seconds) - 1)], 4)
                                      for name, share in (("p50", 0.5), ("p99", 0.99))}} if rows else {"requests": 0}


def test_a_killed_replica_loses_no_request_and_returns(ray, arguments, offline):
    ray.deploy(("killed", {**arguments, "replicas": 2}))
    path = "/killed/v1/completions"
    Load(ray, path, offline, most=16).wait()  # both are warm
    first = ray.processes("killed")
    assert len(first) == 2
    load = Load(ray, path, offline, most=200)
    while len(load.rows) < 80:
        time.sleep(0.005)
    killed = time.monotonic()
    os.kill(first[0], signal.SIGKILL)
    rows = load.wait()
    while len(set(ray.processes("killed")) - {first[0]}) < 2:
        assert time.monotonic() < killed + 60
        time.sleep(0.1)
    back = time.monotonic() - killed
    after = Load(ray, path, offline, most=60).wait()
    outcomes = {row["outcome"] for row in rows}
    assert len(rows) == 200 and outcomes <= {"right", "replica_lost"}, outcomes
    assert {row["outcome"] for row in after} == {"right"}
    assert LOST in ray.logs()  # it was in the middle of some
    times = {"before": percentiles([row for row in rows if row["began"] + row["seconds"] < killed]),
             "across": percentiles([row for row in rows if row["began"] <= killed <= row["began"] + row["seconds"]]),
             "one replica": percentiles([row for row in rows if row["began"] > killed]),
             "after": percentiles(after), "seconds until the replica was back": round(back, 1),
             "right": sum(row["outcome"] == "right" for row in rows), "replica_lost": sum(
                 row["outcome"] == "replica_lost" for row in rows)}
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "killed-replica.json").write_text(json.dumps(times, indent=1) + "\n")
    print(json.dumps(times, indent=1))


def test_where_the_only_replica_is_killed_requests_wait_for_the_next(ray, arguments, offline):
    ray.deploy(("alone", arguments))
    assert ray.ask("/alone/health/ready")[0] == 200
    load = Load(ray, "/alone/v1/completions", offline, most=60)
    while len(load.rows) < 20:
        time.sleep(0.005)
    os.kill(ray.processes("alone")[0], signal.SIGKILL)
    ray.wait_for(lambda: ray.ask("/alone/health/ready")[0] == 503, 5)
    rows = load.wait()
    assert len(rows) == 60 and {row["outcome"] for row in rows} == {"right"}
    assert ray.ask("/alone/health/ready")[0] == 200


def test_replicas_follow_the_load_and_are_seen_in_the_status(ray, arguments, offline):
    scaled = {**arguments, "max_replicas": 2, "target_requests": 1, "upscale_delay": 1, "downscale_delay": 2}
    ray.deploy(("scaled", scaled))
    assert len(ray.processes("scaled")) == 1
    load = Load(ray, "/scaled/v1/completions", offline)
    seen = ray.until(lambda status: running(status) == 2)
    rows = load.end()
    seen += ray.until(lambda status: running(status) == 1)
    assert {row["outcome"] for row in rows} == {"right"}
    counts = [running(status) for status in seen]
    assert [one for one, before in zip(counts, [None, *counts], strict=False) if one != before] == [1, 2, 1]


def running(status):
    return status["scaled"]["deployments"]["replicas"]["states"].get("RUNNING", 0)


@pytest.mark.parametrize("replicas, drain, surge", [(2, 20, 100), (2, 0.1, 100), (1, 20, 0)])
def test_an_update_of_the_bundle_fails_no_request(ray, arguments, offline, sample_bundle, tmp_path, replicas, drain,
                                                  surge):
    arguments = {**arguments, "replicas": replicas, "drain_seconds": drain, "surge_percent": surge}
    name, new = f"updated-{replicas}-{surge}-{drain}", tmp_path / "new.bundle"
    shutil.copytree(sample_bundle.folder, new)
    ray.deploy((name, arguments))
    lost = ray.logs().count(LOST)
    old = {part: set(ray.processes(name, part)) for part in ("replicas", "ingress")}
    load = Load(ray, f"/{name}/v1/completions", offline)
    while len(load.rows) < 20:
        time.sleep(0.01)
    ray.submit((name, {**arguments, "bundle": str(new)}))
    for part, were in old.items():
        ray.wait_for(lambda part=part, were=were: (now := set(ray.processes(name, part))) and not now & were
                     and len(now) == len(were), 90)
    ray.until(lambda status: status[name]["status"] == "RUNNING")
    reached = len(load.rows)
    while len(load.rows) < reached + 20:
        time.sleep(0.01)
    rows = load.end()
    assert {row["outcome"] for row in rows} == {"right"} and len(rows) > 40
    assert (ray.logs().count(LOST) > lost) == (drain < 1)  # that they were cut and asked again
    print(json.dumps(percentiles(rows)))


def test_events_come_as_blocks_are_made_and_a_cancelled_request_frees_its_row(ray, arguments):
    ray.deploy(("streamed", {**arguments, "max_batch": 1}))
    client = OpenAI(base_url=f"http://127.0.0.1:{ray.port}/streamed/v1", api_key="none", max_retries=0)
    many = {"n": 8, "temperature": 0.7, "max_tokens": 320, "stream": True, "extra_body": {"eos_id": -1}}
    whole = 8 * 320
    with client.completions.with_streaming_response.create(
            model="sample", prompt=QUESTIONS[0], extra_headers={"x-request-id": "mine"}, **many) as response:
        lines = response.iter_lines()
        events = [next(line for line in lines if line.startswith("data: {"))]
        assert response.headers["x-request-id"] == "mine"
        status, said, _ = ray.ask("/streamed/v1/requests/cmpl-mine", method="DELETE")
        assert (status, said["cancelled"]) == (200, True)
        events += [line for line in lines if line.startswith("data: {")]
    choices = [json.loads(event[6:])["choices"][0] for event in events]
    assert sum(len(one["token_ids"]) for one in choices) < whole
    assert {one["finish_reason"] for one in choices} - {None} == {"cancelled"}
    assert ray.ask("/streamed/v1/requests/mine", method="DELETE")[0] == 404
    stream = client.completions.create(model="sample", prompt=QUESTIONS[0], **many)
    next(iter(stream))
    stream.close()  # the client leaves
    ray.wait_for(lambda: ray.metric("dmoe_running_rows", "streamed") == 0
                 and ray.metric("dmoe_requests_in_progress", "streamed") == 0
                 and 0 < ray.metric("dmoe_committed_tokens_total", "streamed") < 2 * whole - 320)
    assert "\"outcome\": \"disconnected\"" in ray.logs()
    status, said, _ = ray.ask("/streamed/v1/completions", body_of(QUESTIONS[0]))
    assert status == 200 and said["usage"]["completion_tokens"] == 96


def test_more_than_may_wait_are_refused_and_told_when_to_come_again(ray, arguments):
    ray.deploy(("full", {**arguments, "max_batch": 1, "max_waiting": 1}))
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda number: ray.ask("/full/v1/completions", body_of(QUESTIONS[number])), range(12)))
    refused = [(said["error"]["code"], int(headers["retry-after"])) for status, said, headers in found if status == 429]
    assert refused and all(code == "queue_full" and 1 <= after <= 60 for code, after in refused)
    assert {status for status, _, _ in found} == {200, 429}


def test_prompts_that_begin_alike_meet_the_replica_that_had_their_beginning(ray, arguments):
    ray.deploy(("prefixes", {**arguments, "replicas": 2, "prefix_cache": "64M"}))

    long = [one for one in QUESTIONS if len(one) > 80]

    def cached(group, tail):
        text = f"{long[group]} " * 4 + tail
        status, said, _ = ray.ask("/prefixes/v1/completions", {"model": "sample", "prompt": text, "max_tokens": 32})
        assert status == 200, said
        return said["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert [cached(group, "tell me 1 + 2.") for group in range(10)] == [0] * 10
    assert all(cached(group, "tell me 3 + 4.") >= 32 for group in range(10))  # by chance: one in a thousand
    ray.wait_for(lambda: ray.metric("dmoe_prefix_hit_tokens_total", "prefixes") >= 320)


def test_keys_below_a_prefix_and_a_bundle_that_is_none(ray, arguments, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    ray.deploy(("keys", {**arguments, "api_key_file": str(keys)}))
    assert ray.ask("/keys/health/ready")[0] == 200
    assert ray.ask("/keys/v1/models")[0] == 401
    status, said, _ = ray.ask("/keys/v1/models", authorization="Bearer secret")
    assert (status, [one["id"] for one in said["data"]]) == (200, ["sample"])
    ray.submit(("keys", {**arguments, "bundle": str(tmp_path)}))  # its update fails, and the old one stays
    (*_, last) = ray.until(lambda status: status["keys"]["status"] == "DEPLOY_FAILED")
    print(last)
    status, said, _ = ray.ask("/keys/v1/completions", body_of(QUESTIONS[0]), authorization="Bearer secret")
    assert status == 200, said


def test_the_file_of_deploy_ray_runs_two_bundles(sample_bundle, offline, tmp_path):
    port, file, folder = free_port(), tmp_path / "serve.yaml", Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    bundle = str(sample_bundle.folder)
    result = CliRunner().invoke(main, ["deploy", "ray", bundle, bundle, "--name", "a", "--name", "b", "--port",
                                       str(port), "--cpus", "0.5", "--threads", "1", "--max-batch", "2", "--out",
                                       str(file)])
    assert result.exit_code == 0, result.output
    check = "import sys, yaml; from ray.serve.schema import ServeDeploySchema as S; " \
            "S.model_validate(yaml.safe_load(open(sys.argv[1])))"
    subprocess.run([BIN / "python", "-c", check, file], check=True, env=environment(folder))
    process = subprocess.Popen([BIN / "serve", "run", file], env=environment(folder), cwd=REPOSITORY,
                               stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for name in ("a", "b"):
            end = time.monotonic() + 90
            while True:
                with suppress(OSError):
                    status, said, _ = ask(port, f"/{name}/v1/completions", {**body_of(offline[0][0]), "model": name})
                    if status == 200:
                        break
                assert time.monotonic() < end
                time.sleep(0.5)
            assert said["choices"][0]["token_ids"] == offline[0][1] and said["model"] == name
            assert ask(port, f"/{name}/v1/models")[1]["data"][0]["id"] == name
        process.send_signal(signal.SIGINT)
        process.wait(60)
    finally:
        end_process(process, folder)
