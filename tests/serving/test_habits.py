"""What clients, proxies and load balancers send by habit: what asks for nothing is taken, the rest is said."""

from __future__ import annotations

import http.client
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import openai
import pytest
from page_helpers import ask, house_of, served
from serving import Held, toy_generator

from dmoe_export.serving.app import application
from dmoe_export.serving.engine import Engine
from dmoe_export.serving.schema import OTHERS

QUESTION = {"model": "sample", "messages": [{"role": "user", "content": "what is 2 plus 3?"}], "max_tokens": 32}


@pytest.fixture(scope="module")
def house(sample_bundle):
    with house_of(sample_bundle) as house:
        yield house


@pytest.fixture(scope="module")
def url(house):
    with served(house) as url:
        yield url


def asked(url, **fields):
    return ask(f"{url}/v1/chat/completions", QUESTION | fields)


def test_other_servers_fields_are_taken_where_they_ask_for_nothing(url):
    nothing = {name: values[0] for name, values in OTHERS.items()}
    nothing |= {"top_k": -1, "stop": None, "logit_bias": None, "tools": [], "reasoning_effort": "none", "n": 1,
                "best_of": 1, "verbosity": "medium", "stream_options": None}
    assert asked(url, **nothing).json()["choices"] == asked(url).json()["choices"]
    both = ask(f"{url}/v1/completions", {"model": "sample", "prompt": "what", "n": 2, "best_of": 2, "max_tokens": 4})
    assert both.status == 200 and len(both.json()["choices"]) == 2


@pytest.mark.parametrize(("name", "value"), [
    ("min_p", 0.1), ("repetition_penalty", 1.1), ("ignore_eos", True), ("min_tokens", 3), ("best_of", 3), ("top_k", -2),
    ("chat_template_kwargs", {"enable_thinking": "no"}), ("chat_template_kwargs", 1),
    ("continue_final_message", True), ("verbosity", "low")])
def test_and_refused_where_they_ask_for_something(url, name, value):
    answer = asked(url, **{name: value})
    assert answer.status == 400 and answer.json()["error"]["param"] == name


def test_agents_read_that_a_history_is_too_long(url):
    for more in ({"max_tokens": 256, "messages": QUESTION["messages"] * 90}, {"messages": QUESTION["messages"] * 500},
                 {"messages": [{"role": "user", "content": "x" * 1_600_000}]}):
        answer = asked(url, **more)
        assert answer.status == 400 and answer.json()["error"]["code"] == "context_length_exceeded", answer.text


def test_heads_are_asked_by_load_balancers(url):
    for path in ("/health/live", "/health/ready", "/metrics", "/v1/models", "/"):
        connection = http.client.HTTPConnection(urlsplit(url).netloc)
        connection.request("HEAD", path)
        answer = connection.getresponse()
        assert answer.status == 200 and answer.read() == b"" and int(answer.headers["content-length"]) > 0, path
        connection.close()


def test_the_schema_has_each_operation_once(recwarn, house):
    schema = application(house)._app._app.openapi()
    assert {"/v1/models", "/v1/chat/completions", "/health/live"} <= schema["paths"].keys() and not recwarn.list


@pytest.mark.parametrize("name", ["edit_passes", "threshold", "cache", "eos_id", "early_stop", "stop"])
def test_a_value_without_end_is_not_sent_back(url, name):
    for value in ([1.5] * 5000, "x" * 30_000):
        answer = asked(url, **{name: value})
        assert answer.status == 400 and len(answer.text) < 500, answer.text[:300]


def test_a_slash_too_many_is_404_and_no_redirect_to_a_name_of_the_client_s_choice(url):
    for path in ("/v1/models/", "/health/live/", "/v1/chat/completions/"):
        answer = ask(url + path)
        assert answer.status == 404 and "location" not in answer.headers and "error" in answer.json(), path


def test_a_model_s_name_may_have_slashes(url, house):
    house.models["org/sample"] = house.models["sample"]
    try:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        assert client.models.retrieve("org/sample").id == "sample"  # the engine's own
    finally:
        del house.models["org/sample"]


def test_an_id_that_two_models_have_ends_both(url, house):
    held = {name: Held() for name in ("one", "two")}
    engines = {name: Engine(name, toy_generator(backend), 1, 1, house.metrics) for name, backend in held.items()}
    house.models |= engines
    try:
        with ThreadPoolExecutor(2) as pool:
            asked = [pool.submit(ask_named, url, {"model": name, "prompt": [5, 6, 7], "max_tokens": 40, "eos_id": -1})
                     for name in engines]
            while not all(engine.jobs for engine in engines.values()):
                time.sleep(0.001)
            connection = http.client.HTTPConnection(urlsplit(url).netloc)
            connection.request("DELETE", "/v1/requests/mine")
            assert connection.getresponse().status == 200
            connection.close()
            for backend in held.values():
                backend.free.set()
            assert [one.result()["choices"][0]["finish_reason"] for one in asked] == ["cancelled"] * 2
    finally:
        for name, engine in engines.items():
            held[name].free.set()
            del house.models[name]
            engine.close()


def ask_named(url, body):
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    connection.request("POST", "/v1/completions", json.dumps(body), {
        "content-type": "application/json", "x-request-id": "mine"})
    answer = json.loads(connection.getresponse().read())
    connection.close()
    return answer


def test_a_body_of_two_lengths_is_refused_and_its_connection_closed(url):
    sent = json.dumps(QUESTION).encode()
    with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), timeout=10) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                           b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n"
                           b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n" % (len(sent), sent))
        got = b""
        while piece := connection.recv(65_536):
            got += piece
    assert got.startswith(b"HTTP/1.1 400 ") and b"two_lengths" in got and b"live" not in got
