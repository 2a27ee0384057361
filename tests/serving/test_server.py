"""A server in a process of its own, asked by OpenAI's client and by hand: answers are those of `Generator`."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from serving import serving

from dmoe_export.generator import Generator

QUESTIONS = ["what is 2 plus 3?", "reverse the list 3 1 4 7.", "what is the capital of france?", "sort the list 5 2 9."]
LONG = {"max_tokens": 440, "eos_id": -1, "threshold": 1.0}  # seconds, a token per forward


@pytest.fixture(scope="module")
def served(sample_bundle):
    with serving(sample_bundle.folder, "--name", "sample", "--threads", 1, "--max-batch", 3, "--max-waiting", 2,
                 "--max-body", 100_000) as one:
        yield one


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0)


@pytest.fixture(scope="module")
def offline(sample_bundle):
    with Generator.open(sample_bundle.folder, threads=1) as generator:
        yield generator


def user(text):
    return [{"role": "user", "content": text}]


def chat(client, text, **more):
    ours = {name: more.pop(name) for name in ("threshold", "cache", "eos_id", "coreset_top_p") if name in more}
    return client.chat.completions.create(model="sample", messages=user(text), extra_body=ours or None, **more)


def body(text="what is 2 plus 3?", **more):
    return {"model": "sample", "messages": user(text), **more}


def ask(served, **more):
    return served.ask("POST", "/v1/chat/completions", body(**more))


def test_answers_are_those_of_the_generator(served, client, offline):
    for question in QUESTIONS:
        wanted = offline.generate(question, max_new_tokens=64)[0]
        answer = chat(client, question, max_tokens=64)
        assert answer.choices[0].message.content == wanted.text and answer.choices[0].finish_reason == "stop"
        assert answer.usage.prompt_tokens == wanted.stats.prompt_tokens and answer.model == "sample"
        assert answer.usage.completion_tokens == len(wanted.token_ids) > 0
    record = served.record(answer.id.removeprefix("chatcmpl-"))
    assert record["outcome"] == "eos" and record["new_tokens"] == len(wanted.token_ids)
    assert record["forwards"] == wanted.stats.forwards and not any(q in "".join(served.lines) for q in QUESTIONS)


def test_a_stream_has_an_event_per_block_and_the_same_text(client, offline):
    wanted = list(offline.stream(QUESTIONS[0], max_new_tokens=100, eos_id=-1))
    events = list(chat(client, QUESTIONS[0], max_tokens=100, eos_id=-1, stream=True,
                       stream_options={"include_usage": True}))
    assert [one.choices[0].delta.content for one in events[:-1]] == [block.text for block in wanted]
    assert [one.choices[0].finish_reason for one in events[:-1]] == [None] * (len(wanted) - 1) + ["length"]
    assert events[0].choices[0].delta.role == "assistant" and events[1].choices[0].delta.role is None
    assert not events[-1].choices and events[-1].usage.completion_tokens == 100 and events[0].usage is None


def test_settings_are_the_request_s_own(client, offline):
    options = {"temperature": 0.9, "top_p": 0.8, "seed": 5}
    wanted = [one.text for one in offline.generate([QUESTIONS[1]] * 3, max_new_tokens=40, threshold=0.5, **options)]
    answer = chat(client, QUESTIONS[1], max_completion_tokens=40, n=3, threshold=0.5, **options)
    assert [one.message.content for one in answer.choices] == wanted
    stopped = chat(client, QUESTIONS[0], stop=["="], coreset_top_p=1.0, cache="none")
    assert stopped.choices[0].message.content == "2 + 3 " and stopped.choices[0].finish_reason == "stop"


def test_rows_with_other_settings_at_the_same_time(served, offline):
    """More than the batch has slots, of mixed lengths, routing and caches."""
    mixed = [{"threshold": 0.6}, {"coreset_top_p": 1.0}, {"cache": "none"}, {"temperature": 1.0, "seed": 3},
             {"max_new_tokens": 70, "eos_id": -1}]

    async def main():
        client = openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0)
        answers = await asyncio.gather(*(client.chat.completions.create(
            model="sample", messages=user(QUESTIONS[0]), extra_body=options) for options in mixed))
        await client.close()
        return [answer.choices[0].message.content for answer in answers]

    assert asyncio.run(main()) == [offline.generate(QUESTIONS[0], **options)[0].text for options in mixed]


def test_completions_take_text_and_token_ids(served, client, offline):
    ids = offline.text.encode_chat(user(QUESTIONS[0]))
    wanted = offline.generate([ids, [5, 6, 7]], max_new_tokens=20)
    answer = client.completions.create(model="sample", prompt=[ids, [5, 6, 7]], max_tokens=20)
    assert [one.text for one in answer.choices] == [one.text for one in wanted]
    assert answer.choices[0].model_extra["token_ids"] == wanted[0].token_ids
    assert answer.usage.prompt_tokens == len(ids) + 3
    plain = client.completions.create(model="sample", prompt=QUESTIONS[0], max_tokens=20)
    assert plain.choices[0].text == offline.generate(QUESTIONS[0], chat=False, max_new_tokens=20)[0].text
    parts = "".join(one.choices[0].text for one in client.completions.create(
        model="sample", prompt=ids, max_tokens=20, stream=True))
    assert parts == wanted[0].text
    for prompt in (None, [], {}, [{"role": "user", "content": "x"}], ["a", 1], [[1], True], 5):
        assert served.ask("POST", "/v1/completions", {"model": "sample", "prompt": prompt})[0] == 400, prompt


def test_messages_in_parts_and_other_roles(client, offline):
    parts = [{"type": "text", "text": "what is 2"}, {"type": "text", "text": "plus 3?"}]
    joined = [{"role": "system", "content": "be short"}, {"role": "user", "content": "what is 2\nplus 3?"}]
    for role in ("system", "developer"):
        asked = [{"role": role, "content": "be short", "name": None}, {"role": "user", "content": parts}]
        answer = client.chat.completions.create(model="sample", messages=asked, max_tokens=32)
        assert answer.choices[0].message.content == offline.generate([joined], max_new_tokens=32)[0].text


def test_models_are_listed(client, served):
    assert [one.id for one in client.models.list()] == ["sample"]
    assert client.models.retrieve("sample").model_extra["max_model_len"] == 512
    assert served.ask("GET", "/health/live")[0] == served.ask("GET", "/health/ready")[0] == 200
    assert served.ask("GET", "/docs")[0] == 404
    assert "threshold" in json.dumps(served.ask("GET", "/openapi.json")[2])


REFUSED = [
    ({"foo": 1, "bar": 2}, 400, "Unknown field: foo, bar.", "foo"),
    ({"x\ud800\x1b": 1}, 400, "Unknown field: x\\ud800\\x1b.", "x\\ud800\\x1b"),
    ({"model": "x\ud800"}, 400, "model: ", "model"),
    ({f"f{i}": 1 for i in range(1000)}, 400, "f8, f9, ….", "f0"),
    ({"stream": True, "stream_options": {"usage": True}}, 400, "Unknown field: usage.", "usage"),
    ({"model": "other"}, 404, "not served here", "model"),
    ({"messages": []}, 400, "messages: ", "messages"),
    ({"messages": user(None)}, 400, "needs the texts", "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, "role 'tool'", "messages"),
    ({"messages": user([{"type": "image_url"}])}, 400, "only parts of type text", "messages"),
    ({"messages": user("x") * 1001}, 400, "at most 1000", "messages"),
    ({"messages": user("x\ud800")}, 400, "half a character", "messages"),
    ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [1]}]}, 400, "tool_calls", "messages"),
    ({"threshold": 2}, 400, "threshold is 2", "threshold"),
    ({"threshold": "high"}, 400, "a number", "threshold"),
    ({"cache": "dual"}, 400, "exact", None),
    ({"coreset_size": 4}, 400, "has no meaning in this bundle", "coreset_size"),
    ({"stop": ["x"] * 17}, 400, "stop is", "stop"),
    ({"stop": ["x"] * 10_000}, 400, "stop is", "stop"),
    ({"n": 17}, 400, "n: ", "n"),
    ({"n": True}, 400, "n: ", "n"),
    ({"max_tokens": 5000}, 400, "at most 4096", "max_tokens"),
    ({"max_tokens": 10**4000}, 400, "at most 4096", "max_tokens"),
    ({"max_tokens": True}, 400, "an integer", "max_new_tokens"),
    ({"max_tokens": 500}, 400, "positions", None),
    ({"max_tokens": 5, "max_new_tokens": 6}, 400, "differ", "max_tokens"),
    ({"tools": [{"type": "function"}]}, 400, "tools is given, and the bundle's chat template shows the model", "tools"),
    ({"tools": [5]}, 400, "tools.0: ", "tools"),
    ({"tool_choice": "required"}, 400, "tool_choice is not", "tool_choice"),
    ({"response_format": {"type": "json"}}, 400, "response_format must be of type", "response_format"),
    ({"logit_bias": {"5": 1}}, 400, "logit_bias is not offered", "logit_bias"),
    ({"presence_penalty": 0.5}, 400, "presence_penalty is not offered", "presence_penalty"),
    ({"stream": "yes"}, 400, "stream: ", "stream"),
    ({"stream_options": {}}, 400, "stream_options belongs", "stream_options"),
]


@pytest.mark.parametrize(("more", "status", "words", "param"), REFUSED, ids=[next(iter(one[0])) for one in REFUSED])
def test_refused_in_openai_s_shape(served, more, status, words, param):
    got, headers, answer = served.ask("POST", "/v1/chat/completions", body() | more)
    assert got == status and headers["x-request-id"] and answer.keys() == {"error"}
    error = answer["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert words in error["message"] and error["param"] == param
    assert "/" not in error["message"].replace("/v1/models", "")  # no path of this machine


def test_fields_that_ask_for_nothing_are_taken(served):
    nothing = {"user": "me", "metadata": {"a": "b"}, "store": True, "presence_penalty": 0, "frequency_penalty": 0.0,
               "logprobs": False, "tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "n": None,
               "stop": [],
               "temperature": None, "logit_bias": None, "seed": None, "stream": False, "stream_options": None}
    assert ask(served, **nothing)[2]["choices"] == ask(served)[2]["choices"]


@pytest.mark.parametrize(("method", "path", "sent", "status"), [
    ("POST", "/v1/chat/completions", "{", 400), ("POST", "/v1/chat/completions", "[1]", 400),
    ("POST", "/v1/chat/completions", "[" * 50_000, 400), ("POST", "/v1/chat/completions", None, 400),
    ("POST", "/v1/chat/completions", '{"n": ' + "9" * 5000 + "}", 400), ("GET", "/v1/chat/completions", None, 405),
    ("POST", "/v1/chat/completions", "x" * 200_000, 413), ("POST", "/v1/embeddings", "{}", 404),
    ("GET", "/v1/models/other", None, 404), ("DELETE", "/v1/requests/none", None, 404), ("PUT", "/v1", None, 404)])
def test_bodies_and_paths_that_are_none(served, method, path, sent, status):
    got, _, answer = served.ask(method, path, sent)
    assert got == status and answer["error"]["message"] and answer["error"]["type"] == "invalid_request_error"


def test_a_large_body_is_refused_before_it_was_read(served):
    connection = socket.create_connection(("127.0.0.1", served.port), timeout=10)
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000000\r\n\r\n{")
    assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")
    connection.close()


def test_a_page_of_another_site_cannot_ask_through_a_browser(served):
    assert served.ask("GET", "/v1/models", host="evil.example")[0] == 400
    for host in ("localhost:1", "127.0.0.1", "[::1]:8000"):
        assert served.ask("GET", "/v1/models", host=host)[0] == 200
    status, _, answer = served.ask("POST", "/v1/chat/completions", json.dumps(body()), content_type="text/plain")
    assert status == 400 and "content-type" in answer["error"]["message"]  # a form needs no leave of the other site
    assert "access-control-allow-origin" not in served.ask("OPTIONS", "/v1/models", origin="http://evil.example")[1]


def test_a_full_queue_is_429_and_says_when_to_come_again(served, client):
    streams = [chat(client, QUESTIONS[0], stream=True, **LONG) for _ in range(5)]
    status, headers, answer = ask(served)
    assert status == 429 and 1 <= int(headers["retry-after"]) <= 60
    assert answer["error"]["type"] == "rate_limit_error" and answer["error"]["code"] == "queue_full"
    with pytest.raises(openai.RateLimitError):
        chat(client, QUESTIONS[0])
    for stream in streams:
        stream.close()
    assert served.idle()


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_who_leaves_frees_the_row(served, stream):
    connection = socket.create_connection(("127.0.0.1", served.port), timeout=10)
    sent = json.dumps(body(stream=stream, **LONG)).encode()
    connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                       b"Content-Length: %d\r\n\r\n%s" % (len(sent), sent))
    end = time.monotonic() + 10
    while not served.metric("dmoe_running_rows") and time.monotonic() < end:
        time.sleep(0.01)
    assert served.metric("dmoe_running_rows") == 1
    before = served.metric("dmoe_requests_total", outcome="disconnected")
    connection.close()
    assert served.idle(2)
    assert served.metric("dmoe_requests_total", outcome="disconnected") == before + 1
    assert served.metric("dmoe_cache_tokens") == 0


def test_a_request_is_cancelled_by_its_id(served, client):
    with client.chat.completions.with_streaming_response.create(
            model="sample", messages=user("x"), stream=True, extra_body=LONG) as answer:
        assert served.ask("DELETE", f"/v1/requests/{answer.headers['x-request-id']}")[0] == 200
        lines = [line for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]" and '"finish_reason": "cancelled"' in lines[-2]
    assert served.ask("GET", "/v1/models", x_request_id="mine.1")[1]["x-request-id"] == "mine.1"
    assert served.ask("GET", "/v1/models", x_request_id="not mine")[0] == 400


def test_time_limits_of_a_request(served):
    answer = ask(served, time_limit=0.05, **LONG)[2]
    assert answer["choices"][0]["finish_reason"] == "timeout"


def test_metrics_have_the_field_s_names(served, client):
    chat(client, QUESTIONS[0])
    text = served.ask("GET", "/metrics")[2]
    for name in ("requests_total", "waiting_rows", "running_rows", "requests_in_progress", "queue_seconds_count",
                 "time_to_first_block_seconds_sum", "request_seconds_bucket", "step_seconds_count", "step_rows_count",
                 "committed_tokens_total", "prompt_tokens_total", "tokens_per_forward_count", "unique_experts_count",
                 "expert_bytes_total", "cache_tokens"):
        assert f'\ndmoe_{name}{{' in text and "# HELP" in text, name
    assert served.metric("dmoe_requests_total", outcome="eos", model="sample") > 0


def test_keys_are_asked_for_before_anything_else(sample_bundle, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("# ours\nfirst-key\nsecond-key\n")
    with serving(sample_bundle.folder, "--name", "sample", "--threads", 1, "--api-key-file", keys) as one:
        for key in (None, "Bearer", "Bearer wrong", "first-key", "Basic first-key"):
            named = {"authorization": key} if key else {}
            status, headers, answer = one.ask("POST", "/v1/chat/completions", "not even JSON", **named)
            assert status == 401 and answer["error"]["code"] == "invalid_api_key" and "www-authenticate" in {
                name.lower() for name in headers}
        assert one.ask("GET", "/metrics")[0] == 401 and one.ask("GET", "/health/live")[0] == 200
        first, second = ({"authorization": f"Bearer {key}"} for key in ("first-key", "second-key"))
        assert one.ask("POST", "/v1/chat/completions", body(), **first)[0] == 200
        client = openai.OpenAI(base_url=f"{one.url}/v1", api_key="first-key", max_retries=0)
        with client.chat.completions.with_streaming_response.create(
                model="sample", messages=user("x"), stream=True, extra_body=LONG) as answer:
            mine = f"/v1/requests/{answer.headers['x-request-id']}"
            assert one.ask("DELETE", mine, **second)[0] == 404  # another key's request
            assert one.ask("DELETE", mine, **first)[0] == 200
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{one.url}/v1", api_key="no", max_retries=0).models.list()
        assert "first-key" not in "".join(one.lines)


def test_sigterm_lets_requests_end_and_refuses_new_ones(sample_bundle, offline):
    with serving(sample_bundle.folder, sample_bundle.folder, "--name", "sample", "--name", "b", "--threads", 1,
                 "--log-prompts") as one:
        client = openai.OpenAI(base_url=f"{one.url}/v1", api_key="any", max_retries=0)
        stream = chat(client, QUESTIONS[0], stream=True, **LONG)
        one.process.terminate()
        time.sleep(0.2)
        status, headers, answer = ask(one)
        assert status == 503 and answer["error"]["code"] == "shutting_down" and headers["retry-after"]
        assert one.ask("GET", "/health/ready")[0] == 503 and one.ask("GET", "/health/live")[0] == 200
        events = list(stream)
        wanted = offline.generate(QUESTIONS[0], max_new_tokens=440, eos_id=-1, threshold=1.0)[0]
        assert "".join(event.choices[0].delta.content for event in events) == wanted.text
        assert one.process.wait(10) == 0
        assert one.record(events[0].id.removeprefix("chatcmpl-"))["prompt"] == [user(QUESTIONS[0])]


def test_what_does_not_end_in_time_is_cancelled(sample_bundle):
    with serving(sample_bundle.folder, "--name", "sample", "--threads", 1, "--drain-seconds", 0) as one:
        client = openai.OpenAI(base_url=f"{one.url}/v1", api_key="any", max_retries=0)
        stream = chat(client, QUESTIONS[0], stream=True, **LONG)
        one.process.terminate()
        assert [event.choices[0].finish_reason for event in stream][-1] == "cancelled"
        assert one.process.wait(10) == 0


def test_bodies_that_are_much_work_leave_the_server_awake(sample_bundle):
    """Half of the largest body that is taken by default: two at once must not keep it from answering for a second."""
    size = 1 << 20
    bodies = [("chat/completions", body(**{f"f{i}": 1 for i in range(size // 12)})),
              ("chat/completions", body([{"type": "text", "text": "a"}] * (size // 34))),
              ("chat/completions", body("what is 2 plus 3? " * (size // 200))),
              ("chat/completions", body(stop=["x"] * (size // 5))),
              ("completions", {"model": "sample", "prompt": [5] * (size // 3)}),
              ("completions", {"model": "sample", "prompt": ["a"] * (size // 5)})]
    with serving(sample_bundle.folder, "--name", "sample", "--threads", 1) as one, ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(one.ask, "POST", f"/v1/{path}", json.dumps(sent)) for path, sent in bodies]
        slowest = 0.0
        while not all(future.done() for future in asked):
            start = time.monotonic()
            assert one.ask("GET", "/health/live")[0] == 200
            slowest = max(slowest, time.monotonic() - start)
        assert [future.result()[0] for future in asked] == [400] * len(bodies) and slowest < 1, slowest
