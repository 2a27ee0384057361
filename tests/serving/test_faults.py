"""What goes wrong around a server: each has a proper status, and other requests do not notice."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
import time
from contextlib import suppress

import pytest
from conftest import SAMPLE
from load_helpers import Asked, ask, load, requests_of, resident_bytes
from serving import serving

from dmoe_export.generator import Generator

QUESTIONS = [json.loads(line)["question"] for line in (SAMPLE / "held_out.jsonl").read_text().splitlines()]
LONG = {"max_tokens": 200, "eos_id": -1, "threshold": 1.0}  # a token per forward


def body(text=QUESTIONS[0], **more):
    return {"model": "sample", "messages": [{"role": "user", "content": text}], **more}


def raw(served, sent, head=b"", path=b"/v1/chat/completions"):
    """A connection on which a request, or a part of one, was sent."""
    connection = socket.create_connection(("127.0.0.1", served.port), timeout=20)
    lines = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n" % path
    connection.sendall(lines + (head or b"Content-Length: %d\r\n" % len(sent)) + b"\r\n" + sent)
    return connection


def rest(connection):
    """All that still comes, until the other side closes."""
    got = b""
    while piece := connection.recv(65_536):
        got += piece
    connection.close()
    return got


@pytest.fixture(scope="module")
def served(sample_bundle):
    with serving(sample_bundle.folder, "--name", "sample", "--threads", 1, "--max-batch", 4) as one:
        one.answer = one.ask("POST", "/v1/chat/completions", body())[2]["choices"]
        yield one


@pytest.fixture
def unharmed(served):
    """Afterwards the server answers as before, and nothing is left in it."""
    yield
    assert served.ask("POST", "/v1/chat/completions", body())[2]["choices"] == served.answer
    assert served.idle(5) and served.metric("dmoe_cache_tokens") == 0
    assert not [line for line in served.lines if not line.startswith(("{", "dmoe-export: "))], served.lines


@pytest.mark.usefixtures("unharmed")
def test_slow_readers_hold_nobody_up(served):
    """Four streams fill the batch and are not read; then they are, to the end."""
    sent = json.dumps(body(stream=True, **LONG)).encode()
    slow = [raw(served, sent, b"Connection: close\r\nContent-Length: %d\r\n" % len(sent)) for _ in range(4)]
    assert served.ask("POST", "/v1/chat/completions", body())[2]["choices"] == served.answer
    for connection in slow:
        got = rest(connection)
        assert got.startswith(b"HTTP/1.1 200") and got.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


@pytest.mark.usefixtures("unharmed")
def test_half_open_connections_hold_nobody_up(served):
    """Nothing, half a head, half a body; the last ones stay open while others ask."""
    nothing = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(100)]
    heads = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(100)]
    for connection in heads:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: local")
    bodies = [raw(served, b'{"model"', b"Content-Length: 1000\r\n") for _ in range(100)]
    start = time.monotonic()
    assert served.ask("POST", "/v1/chat/completions", body())[2]["choices"] == served.answer
    assert served.ask("GET", "/health/live")[0] == 200 and time.monotonic() - start < 2
    for connection in nothing + heads + bodies:
        connection.close()


@pytest.mark.slow
@pytest.mark.usefixtures("unharmed")
def test_who_sends_no_headers_is_hung_up_on_and_a_body_has_a_time_limit(served):
    silent = socket.create_connection(("127.0.0.1", served.port), timeout=40)
    late = raw(served, b'{"model"', b"Content-Length: 1000\r\n")
    late.settimeout(40)
    start = time.monotonic()
    assert rest(silent) == b"" and 8 < time.monotonic() - start < 15
    assert rest(late).startswith(b"HTTP/1.1 408 ") and 25 < time.monotonic() - start < 35


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_a_body_of_100_megabytes_is_refused_and_not_kept(served, chunked):
    before, counted = resident_bytes(served.process.pid), served.metric("dmoe_requests_total", outcome="too_large")
    head = b"Transfer-Encoding: chunked\r\n" if chunked else b"Content-Length: 100000000\r\n"
    connection, piece = raw(served, b"", head), b"x" * 1_000_000
    with connection, suppress(BrokenPipeError, ConnectionResetError):  # once it reads no more
        for _ in range(100):
            connection.sendall(b"%x\r\n%s\r\n" % (len(piece), piece) if chunked else piece)
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")
    end = time.monotonic() + 5  # it reads on for a moment, so that the client reads why
    while served.metric("dmoe_requests_total", outcome="too_large") == counted and time.monotonic() < end:
        time.sleep(0.05)
    assert served.metric("dmoe_requests_total", outcome="too_large") == counted + 1
    assert resident_bytes(served.process.pid) - before < 30 << 20


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize(("name", "value", "status"), [
    ("stop", ["x" * 5] * 10_000, 400), ("stop", "x" * 100_000, 400), ("metadata", {"a": "b" * 10**6}, 200),
    ("eos_id", list(range(100_000)), 400), ("seed", 10**300, 400), ("temperature", 1e308, 200)])
def test_fields_that_are_far_too_much(served, name, value, status):
    got, _, answer = served.ask("POST", "/v1/chat/completions", body(**{name: value}))
    assert got == status, answer
    assert status == 200 or (answer["error"]["param"] == name and len(answer["error"]["message"]) < 1000)


def test_sigterm_under_load_ends_with_0_and_every_answer_is_whole(sample_bundle):
    requests = requests_of(5, 60, QUESTIONS, "be short", cancelled=0, malformed=0)
    with serving(sample_bundle.folder, "--name", "sample", "--threads", 1, "--max-batch", 2) as one:
        clients = threading.Thread(target=load, args=(one.port, requests, 8))
        clients.start()
        while one.metric("dmoe_committed_tokens_total") < 100:
            time.sleep(0.005)
        one.process.terminate()
        clients.join()
        assert one.process.wait(40) == 0
    answered = [asked for asked in requests if asked.status == 200]
    others = [asked for asked in requests if asked.status != 200]
    assert answered and others and {asked.status for asked in others} <= {0, 503}
    assert all(isinstance(asked.error, OSError) for asked in others if not asked.status)  # nobody listens any more
    with Generator.open(sample_bundle.folder, threads=1) as generator:
        for asked in answered:
            options = {{"max_tokens": "max_new_tokens"}.get(name, name): value for name, value in asked.options.items()}
            assert asked.text == generator.generate([asked.messages], **options)[0].text, asked


@pytest.mark.parametrize("budget", [("--expert-budget", "25%"), ()], ids=["budget", "whole"])
def test_a_bundle_cut_short_while_it_is_served(sample_bundle, tmp_path, budget):
    """Its requests fail from then on, and it is not ready any more; the other model answers."""
    folder = tmp_path / "own.bundle"
    shutil.copytree(sample_bundle.folder, folder)
    with serving(folder, sample_bundle.folder, "--name", "sample", "--name", "other", "--threads", 1, *budget) as one:
        assert one.ask("GET", "/health/ready")[0] == 200
        wanted = one.ask("POST", "/v1/chat/completions", body())
        stream = Asked("stream", [], {}, json.dumps(body(stream=True, **LONG)))
        client = threading.Thread(target=ask, args=(one.port, stream))
        client.start()
        while not one.metric("dmoe_running_rows", model="sample"):
            time.sleep(0.005)
        os.truncate(folder / "experts.bin", (folder / "experts.bin").stat().st_size // 2)
        status, _, answer = one.ask("POST", "/v1/chat/completions", body())
        client.join()
        other = one.ask("POST", "/v1/chat/completions", body() | {"model": "other"})
        assert other[0] == 200 and other[2]["choices"] == wanted[2]["choices"]
        assert status == 500 and answer["error"]["message"].startswith("sample/experts.bin was changed or removed")
        assert stream.status == 200 and stream.error["code"] == "model_error"  # the last event but [DONE]
        assert one.ask("GET", "/health/live")[0] == 200 and one.ask("GET", "/health/ready")[0] == 503 and one.idle(5)


TEMPLATE_FAULTS = ("{{ raise_exception('no') }}", "{% for i in range(10**9) %}x{% endfor %}", "{{ 1 // 0 }}",
                   "{{ messages.pop.__globals__ }}")


def test_a_template_that_fails_fails_its_request_alone(exported, tmp_path):
    """It does so for questions that begin with a fault's number."""
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(SAMPLE, checkpoint)
    text = "".join(f"{{% if messages[-1]['content'].startswith('fault {i}') %}}{fault}{{% endif %}}"
                   for i, fault in enumerate(TEMPLATE_FAULTS))
    template = checkpoint / "chat_template.jinja"
    template.write_text(text + template.read_text())
    bundle = exported(checkpoint, precision="fp32")
    with serving(bundle.folder, "--name", "sample", "--threads", 1) as one:
        good = Asked("whole", [], {}, json.dumps(body(**LONG)))
        client = threading.Thread(target=ask, args=(one.port, good))
        client.start()
        for i, fault in enumerate(TEMPLATE_FAULTS):
            status, _, answer = one.ask("POST", "/v1/chat/completions", body(f"fault {i} here"))
            assert status == 400 and answer["error"]["type"] == "invalid_request_error", (fault, answer)
            assert "here" not in answer["error"]["message"] and str(bundle.folder) not in answer["error"]["message"]
        client.join()
        assert good.status == 200 and good.finish == "length"
        assert one.ask("POST", "/v1/chat/completions", body())[0] == 200 and one.idle(5)
