"""A Ray cluster of this machine for a test, in the environment that `make test-ray` makes."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from serving import free_port

REPOSITORY = Path(__file__).parents[2]
BIN = REPOSITORY / ".venv-ray" / "bin"
needs_ray = pytest.mark.skipif(not (BIN / "serve").exists(), reason="Ray is not installed: make test-ray")
_UP = 120  # seconds


def environment(folder):
    """Of Ray's processes: nothing of it lands in the user's home."""
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_metrics_report_interval_ms": "500",
            "HOME": str(folder), "RAY_TMPDIR": str(folder), "no_proxy": "*"}


class Cluster:
    """A driver with Serve; applications are configurations as `deploy ray` writes them."""

    def __init__(self, process, port, folder):
        self.process, self.port, self.folder = process, port, folder

    def do(self, what, value=None):
        self.process.stdin.write(json.dumps([what, value]) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self):
        for line in self.process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        raise AssertionError(f"Ray's driver has ended; its logs are in {self.folder}")

    def deploy(self, *applications, seconds=_UP):
        """Deploy, and wait until all of them run; each is (name, arguments)."""
        self.submit(*applications)
        self.until(lambda status: all(status.get(name, {}).get("status") == "RUNNING" for name, _ in applications),
                   seconds)

    def submit(self, *applications):
        self.do("deploy", {"applications": [
            {"name": name, "route_prefix": f"/{name}", "import_path": "dmoe_export.serving.ray:app",
             "args": arguments} for name, arguments in applications]})

    def until(self, wanted, seconds=_UP):
        """Wait until the status is so; the statuses on the way, without repetition."""
        seen, end = [], time.monotonic() + seconds
        while time.monotonic() < end:
            status = self.do("status")
            if not seen or seen[-1] != status:
                seen.append(status)
            if wanted(status):
                return seen
            time.sleep(0.2)
        raise AssertionError(seen[-3:])

    def processes(self, application, deployment="replicas"):
        return self.do("processes", application).get(deployment, [])

    def metric(self, name, application):
        """Sum of a metric over the replicas of an application."""
        found = re.findall(rf'^ray_{name}{{.*application="{application}".*}} (\S+)$', self.do("metrics"), re.MULTILINE)
        return sum(map(float, found))

    def wait_for(self, wanted, seconds=30):
        """Until it is true."""
        end = time.monotonic() + seconds
        while not wanted():
            assert time.monotonic() < end
            time.sleep(0.1)

    def ask(self, path, body=None, timeout=60, method=None, **headers):
        """(status, JSON or text, headers)"""
        return ask(self.port, path, body, timeout, method, **headers)

    def logs(self):
        """Of all of Ray's processes."""
        return "\n".join(path.read_text(errors="replace") for path in self.folder.rglob("session_2*/logs/**/*")
                         if path.is_file() and path.suffix in (".log", ".err", ".out"))


def ask(port, path, body=None, timeout=60, method=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    named = {"content-type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
    try:
        connection.request(method or ("POST" if body else "GET"), path, body and json.dumps(body), named)
        answer = connection.getresponse()
        text = answer.read().decode()
    finally:
        connection.close()
    is_json = answer.headers.get("content-type", "").startswith("application/json")
    return answer.status, json.loads(text) if is_json else text, dict(answer.headers)


@contextmanager
def cluster(cpus=2):
    """Ended, and its processes with it."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # short: it is part of a socket's path
    port = free_port()
    process = subprocess.Popen(
        [BIN / "python", Path(__file__).parent / "ray_driver.py", folder, str(port), str(cpus)], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment(folder),
        cwd=REPOSITORY)
    made = Cluster(process, port, folder)
    timer = threading.Timer(_UP, process.kill)
    timer.start()
    try:
        assert made.answer() == {"up": True}
        timer.cancel()
        yield made
    finally:
        timer.cancel()
        end(process, folder)


def end(process, folder):
    """Let the driver end, then whatever Ray left of this folder, and the folder."""
    with suppress(OSError):
        process.stdin.close()
    with suppress(subprocess.TimeoutExpired):
        process.wait(40)
    process.kill()
    process.wait()
    for left in processes_of(folder):
        with suppress(ProcessLookupError):
            os.kill(left, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


def processes_of(folder):
    """Those that have the folder in their command line or environment."""
    found, mark = [], str(folder).encode()
    for one in Path("/proc").iterdir():
        if one.name.isdigit() and int(one.name) != os.getpid():
            with suppress(OSError):
                if mark in (one / "cmdline").read_bytes() or mark in (one / "environ").read_bytes():
                    found.append(int(one.name))
    return found
