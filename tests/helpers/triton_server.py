"""The tritonserver of the wheel nvidia-pytriton over a repository, and tritonclient, both in `.venv-triton`."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from serving import free_port

REPOSITORY = Path(__file__).parents[2]
PYTHON = REPOSITORY / ".venv-triton" / "bin" / "python"
NUMPY_2 = REPOSITORY / ".venv-triton" / "numpy2"  # a folder that has it
CLIENT = Path(__file__).with_name("triton_client.py")
_UP = 60  # seconds for a server to begin


@dataclass
class Triton:
    """A running server; `lines` grows with its log."""

    process: subprocess.Popen
    http: int
    grpc: int
    metrics: int
    lines: list[str] = field(default_factory=list)

    def ask(self, method, path, body=None, timeout=60, port=None):
        """(status, JSON or text)"""
        connection = http.client.HTTPConnection("127.0.0.1", port or self.http, timeout=timeout)
        try:
            connection.request(method, path, body if isinstance(body, (str, bytes)) else json.dumps(body or {}))
            answer = connection.getresponse()
            text = answer.read().decode()
        finally:
            connection.close()
        return answer.status, json.loads(text) if text.startswith(("{", "[")) else text

    def generate(self, model, **body):
        """(status, JSON) of one answer"""
        return self.ask("POST", f"/v2/models/{model}/generate", body)

    def stream(self, model, **body):
        """(status, events, seconds of each) of a streamed answer, read as they come."""
        connection = http.client.HTTPConnection("127.0.0.1", self.http, timeout=60)
        try:
            start = time.monotonic()
            connection.request("POST", f"/v2/models/{model}/generate_stream", json.dumps(body | {"stream": True}))
            answer = connection.getresponse()
            events, seconds = [], []
            for line in answer:
                if line.startswith(b"data: "):
                    events.append(json.loads(line[6:]))
                    seconds.append(time.monotonic() - start)
        finally:
            connection.close()
        return answer.status, events, seconds

    def leave(self, model, **body):
        """Begin a streamed answer, read its first event and close the connection; the event."""
        connection = http.client.HTTPConnection("127.0.0.1", self.http, timeout=60)
        try:
            connection.request("POST", f"/v2/models/{model}/generate_stream", json.dumps(body | {"stream": True}))
            return json.loads(connection.getresponse().readline()[6:])
        finally:
            connection.close()

    def grpc_streams(self, model, requests, **more):
        """Answers of tritonclient's gRPC stream to several requests at once (see `triton_client.py`)."""
        asked = json.dumps({"url": f"127.0.0.1:{self.grpc}", "model": model, "requests": requests, **more})
        done = subprocess.run([PYTHON, CLIENT], input=asked, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def state(self, model):
        """(state, reason) of a model's only version."""
        found = [one for one in self.ask("POST", "/v2/repository/index")[1] if one["name"] == model]
        return found[0].get("state"), found[0].get("reason", "")

    def instances(self, model):
        """Memory in kB of each process of a model."""
        shown = subprocess.run(["ps", "-ww", "-o", "rss=,args=", "--ppid", str(self.process.pid)], capture_output=True,
                               text=True, check=False).stdout
        return [int(line.split()[0]) for line in shown.splitlines() if f"/{model}/" in line]

    def metric(self, name, **labels):
        """Sum of a metric over its other labels."""
        found = re.findall(rf"^{name}{{(.*)}} (\S+)$", self.ask("GET", "/metrics", port=self.metrics)[1],
                           flags=re.MULTILINE)
        return sum(float(value) for shown, value in found
                   if all(f'{key}="{wanted}"' in shown for key, wanted in labels.items()))

    def idle(self, seconds=20):
        """Wait until no row and no request is in it; whether that came true."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if not self.metric("dmoe_requests_in_progress") and not self.metric("dmoe_running_rows"):
                return True
            time.sleep(0.05)
        return False


def python_with(folder, first):
    """An environment of `.venv-triton` in which a folder of modules comes first; its python."""
    real = PYTHON.parent.parent
    (packages,) = real.glob("lib/python3.*/site-packages")
    mine = folder / packages.relative_to(real)
    mine.mkdir(parents=True)
    (mine / "first.pth").write_text(f"{first}\nimport site; site.addsitedir({str(packages)!r})\n")
    shutil.copy(real / "pyvenv.cfg", folder)
    (folder / "bin").mkdir()
    for name in ("python", "python3"):
        (folder / "bin" / name).symlink_to(PYTHON.resolve())
    return folder / "bin" / "python"


@contextmanager
def triton_server(repository, folder, *options, python=PYTHON, ends_with=0, **environment):
    """A server over a repository, models loaded when they are asked for by `--load-model`; `folder` is for its files.

    `python`: of the models; `ends_with`: its exit status after SIGTERM.
    """
    facts = json.loads(subprocess.run(
        [PYTHON, "-c", "import json, sys, sysconfig; print(json.dumps([sysconfig.get_paths()['purelib'], "
         "sysconfig.get_config_var('LIBDIR'), '%d.%d' % sys.version_info[:2]]))"], capture_output=True, text=True,
        check=True).stdout)
    packages, backend = Path(facts[0]), Path(folder) / "backends" / "python"
    server = packages / "pytriton" / "tritonserver"
    shutil.copytree(server / "backends" / "python", backend, dirs_exist_ok=True)
    shutil.copy(server / "python_backend_stubs" / facts[2] / "triton_python_backend_stub", backend)
    ports = [free_port() for _ in range(3)]
    command = [server / "bin" / "tritonserver", "--model-repository", repository, "--backend-directory", backend.parent,
               "--http-port", ports[0], "--grpc-port", ports[1], "--metrics-port", ports[2], "--http-address",
               "127.0.0.1", "--grpc-address", "127.0.0.1", "--metrics-address", "127.0.0.1", "--model-control-mode",
               "explicit", "--exit-on-error", "false", "--exit-timeout-secs", "2" if ends_with else "30",
               "--metrics-interval-ms", "100",
               "--backend-config", f"python,shm-region-prefix-name=dmoe_{os.getpid()}_{ports[0]}", *options]
    known = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    known |= {"PATH": f"{python.parent}:{known['PATH']}", "OMP_NUM_THREADS": "1",
              "LD_LIBRARY_PATH": f"{packages / 'nvidia_pytriton.libs'}:{facts[1]}", **environment}
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               errors="replace", cwd=folder, env=known)
    served, up = Triton(process, *ports), threading.Event()

    def read():
        for line in process.stdout:
            served.lines.append(line.rstrip("\n"))
            if "Started Metrics Service" in line:
                up.set()
        up.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert up.wait(_UP) and process.poll() is None, "\n".join(served.lines)
        yield served
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == ends_with, "\n".join(served.lines[-50:])
    finally:
        process.kill()
        process.wait()
        reader.join(5)
