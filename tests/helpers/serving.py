"""A server in a process of its own, and a generator without a model whose forwards a test lets through."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

from toy_backend import Toy

from dmoe_export.generator import Generator

_UP = 60  # seconds for a server to begin


@dataclass
class Served:
    """A running server; `lines` grows with what it says on standard error."""

    process: subprocess.Popen
    port: int = 0
    lines: list[str] = field(default_factory=list)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def ask(self, method, path, body=None, timeout=30, **headers):
        """(status, headers, JSON or text); a dictionary is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        sent = json.dumps(body) if isinstance(body, (dict, list)) else body
        named = {"content-type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
        try:
            connection.request(method, path, sent, named)
            answer = connection.getresponse()
            text = answer.read().decode()
        finally:
            connection.close()
        is_json = answer.headers.get("content-type", "").startswith("application/json")
        return answer.status, dict(answer.headers), json.loads(text) if is_json else text

    def metric(self, name, **labels):
        """Sum of a metric's values over the other labels; 0 where it has none."""
        found = re.findall(rf"^{name}(?:{{(.*)}})? (\S+)$", self.ask("GET", "/metrics")[2], flags=re.MULTILINE)
        return sum(float(value) for shown, value in found
                   if all(f'{key}="{wanted}"' in shown for key, wanted in labels.items()))

    def records(self):
        """The structured lines so far."""
        return [json.loads(line) for line in self.lines if line.startswith("{")]

    def record(self, request_id, seconds=10):
        """The structured line of a request; it is written after the answer."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := [one for one in self.records() if one["request"] == request_id]:
                return found[0]
            time.sleep(0.01)
        raise AssertionError(f"no line of {request_id}")

    def idle(self, seconds=10):
        """Wait until no row and no request is in it; whether that came true."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if not self.metric("dmoe_requests_in_progress") and not self.metric("dmoe_running_rows"):
                return True
            time.sleep(0.02)
        return False


@contextmanager
def serving(*arguments, **environment):
    """`dmoe-export serve` with these arguments, on a free port; ended with SIGTERM, which must give 0."""
    command = [sys.executable, "-m", "dmoe_export", "serve", *map(str, arguments), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
                               env={**os.environ, "OMP_NUM_THREADS": "1", **environment})
    served, up = Served(process), threading.Event()

    def read():
        for line in process.stderr:
            served.lines.append(line.rstrip("\n"))
            if found := re.fullmatch(r"dmoe-export: serving on http://\S+:(\d+)\n", line):
                served.port = int(found[1])
                up.set()
        up.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert up.wait(_UP) and served.port, "\n".join(served.lines)
        yield served
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            assert process.wait(40) == 0, "\n".join(served.lines)
    finally:
        process.kill()
        process.wait()
        reader.join(5)


def free_port():
    """A port that nobody had a moment ago."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Held(Toy):
    """A toy whose forwards wait until they are let through."""

    def __init__(self, **more):
        super().__init__(**more)
        self.free, self.fail = threading.Event(), None

    def forward(self, inputs, cache):
        assert self.free.wait(30)
        if self.fail:
            raise self.fail
        return super().forward(inputs, cache)

    def close(self):
        pass


def toy_generator(backend):
    """A real `Generator` over a toy: no tokenizer, no files."""
    manifest = SimpleNamespace(tokenizer=None, decode_defaults={}, presets={}, bytes_per_expert=0, precision=None,
                               denoiser=SimpleNamespace(opens_blocks=False),
                               routing=backend.routing, model=backend.description,
                               step_tokens=backend.description.step_tokens(backend.routing))
    return Generator(SimpleNamespace(folder=Path("/somewhere/toy.bundle"), manifest=manifest), backend)
