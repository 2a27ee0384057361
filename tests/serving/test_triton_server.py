"""The real tritonserver of the wheel nvidia-pytriton, and tritonclient (`make test-triton`)."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
import time

import pytest
from triton_server import NUMPY_2, PYTHON, REPOSITORY, python_with, triton_server

from dmoe_export.deploy.triton import model_config
from dmoe_export.generator import Generator

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300),
              pytest.mark.skipif(not PYTHON.exists(), reason="Triton is not installed: make test-triton")]
QUESTIONS = ["what is 2 plus 3?", "what is the capital of france?", "write the numbers 4 7 1 9 from last to first.",
             "reverse the list 3 1 4 7.", "what is 9 minus 4?", "what is 7 plus 12?", "what is the capital of italy?",
             "tom has 12 apples and buys 7 more. how many apples does tom have?"]
LONG = {"max_tokens": 192, "eos_id": -1}  # six blocks of the sample


def deploy(bundle, repository, *options):
    subprocess.run([sys.executable, "-m", "dmoe_export", "deploy", "triton", bundle, "--out", repository, "--threads",
                    "1", *options], check=True, capture_output=True)


@pytest.fixture(scope="module")
def generator(sample_bundle):
    with Generator.open(sample_bundle.folder, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def repository(sample_bundle, tmp_path_factory):
    """Of two models: `sample`, and `a.lone-1` with one place in its batch."""
    folder = tmp_path_factory.mktemp("triton") / "repository"
    deploy(sample_bundle.folder, folder, "--name", "sample")
    deploy(sample_bundle.folder, folder, "--name", "a.lone-1", "--max-batch", "1", "--max-waiting", "1")
    return folder


@pytest.fixture(scope="module")
def server(repository):
    """Over both."""
    with triton_server(repository, repository.parent, "--load-model", "sample", "--load-model", "a.lone-1") as one:
        yield one


def test_generate_answers_as_offline(server, generator):
    for question in QUESTIONS[:3]:
        offline = generator.generate(question, max_new_tokens=64)[0]
        status, answer = server.generate("sample", text_input=question, chat=True, max_tokens=64)
        assert status == 200 and answer["text_output"] == offline.text and answer["finish_reason"] == "stop"
        assert answer["output_ids"] == offline.token_ids and answer["num_output_tokens"] == len(offline.token_ids)


def test_blocks_come_as_they_are_finished_over_http(server, generator):
    """`generate_stream`: an event per block, the first long before the last."""
    blocks = list(generator.stream(QUESTIONS[2], max_new_tokens=192, eos_id=-1))
    status, events, seconds = server.stream("sample", text_input=QUESTIONS[2], chat=True, **LONG)
    assert status == 200 and [event["output_ids"] for event in events] == [one.token_ids for one in blocks]
    assert "".join(event["text_output"] for event in events) == "".join(one.text for one in blocks)
    assert [event["finish_reason"] for event in events] == [""] * (len(blocks) - 1) + ["length"] and len(blocks) > 5
    assert all(event["num_output_tokens"] == len(one.token_ids) and event["num_input_tokens"] > 0
               for event, one in zip(events, blocks, strict=True))
    assert seconds[0] < seconds[2] < seconds[-1] and seconds[0] < 0.7 * seconds[-1]


def test_eight_streams_at_once_over_grpc_are_as_offline(server, generator):
    offline = [generator.generate(one, max_new_tokens=96, eos_id=-1, threshold=0.8)[0] for one in QUESTIONS]
    requests = [{"inputs": {"text_input": one, "stream": True}, "id": f"r{number}", "parameters": {
        "chat": True, "max_tokens": 96, "eos_id": -1}} for number, one in enumerate(QUESTIONS)]
    for request in requests:
        request["inputs"]["sampling_parameters"] = json.dumps({"threshold": 0.8})
    answers = server.grpc_streams("sample", requests)
    for one, answer in zip(offline, answers, strict=True):
        assert answer["error"] is None and answer["final"] and len(answer["parts"]) >= 3
        assert [i for part in answer["parts"] for i in part["output_ids"]] == one.token_ids
        assert "".join(part["text_output"][0] for part in answer["parts"]) == one.text
        assert [part["finish_reason"] for part in answer["parts"]] == [*[[""]] * (len(answer["parts"]) - 1), ["length"]]
        assert answer["seconds"][0] < answer["seconds"][-1]
    assert server.metric("dmoe_step_rows_sum", model="sample") > server.metric("dmoe_step_rows_count", model="sample")


def test_messages_token_ids_and_one_response_for_the_whole(server, generator):
    messages = [{"role": "user", "content": "what is 2 plus 3?"}]
    ids = generator.generate([5, 6, 7], max_new_tokens=40, eos_id=-1)[0]
    sampled = generator.generate("what is", chat=False, max_new_tokens=40, eos_id=[-1], temperature=1.0, seed=3,
                                 stop=["zzz", "yyy"])[0]
    answers = server.grpc_streams("sample", [
        {"inputs": {"messages": json.dumps(messages)}},
        {"inputs": {"input_ids": [5, 6, 7], "exclude_input_in_output": True, "return_finish_reason": True},
         "parameters": {"max_tokens": 40, "eos_id": -1}},
        {"inputs": {"text_input": "what is", "sampling_parameters": json.dumps(
            {"temperature": 1.0, "seed": 3, "eos_id": [-1], "stop": ["zzz", "yyy"], "max_tokens": 40})}}])
    assert all(len(answer["parts"]) == 1 and answer["final"] for answer in answers), answers
    (chat,), (plain,), (drawn,) = (answer["parts"] for answer in answers)
    assert chat["text_output"] == [generator.generate([messages])[0].text] and chat["finish_reason"] == ["stop"]
    assert plain["output_ids"] == ids.token_ids and plain["num_input_tokens"] == [3]
    assert plain["num_output_tokens"] == [40] and plain["finish_reason"] == ["length"]
    assert drawn["output_ids"] == sampled.token_ids and drawn["text_output"] == [sampled.text]


def test_a_request_of_the_vllm_backend_s_own_client(server, generator):
    """Numbers as texts, all settings twice, one of the outputs asked for."""
    settings = {"temperature": "5.0", "top_p": "0.99", "max_tokens": "100", "eos_id": "-1"}
    offline = generator.generate("what is 2 plus 3?", chat=False, temperature=5.0, top_p=0.99, max_new_tokens=100,
                                 eos_id=-1)[0]
    assert offline.text
    for stream in (True, False):
        (answer,) = server.grpc_streams("sample", [{
            "inputs": {"text_input": "what is 2 plus 3?", "stream": stream, "exclude_input_in_output": stream,
                       "sampling_parameters": json.dumps(settings)},
            "parameters": settings, "id": "0", "outputs": ["text_output"]}])
        assert answer["final"] and all(part.keys() == {"text_output"} for part in answer["parts"]), answer
        before = "" if stream else "what is 2 plus 3?"
        assert "".join(part["text_output"][0] for part in answer["parts"]) == before + offline.text


def test_a_client_that_leaves_frees_its_row(server):
    """In a batch of one, the next request is answered long before the first would have ended."""
    long = {"max_tokens": 480, "eos_id": -1}
    (answer,) = server.grpc_streams("a.lone-1", [
        {"inputs": {"input_ids": [5, 6, 7], "stream": True}, "parameters": long, "cancel_after": 1}])
    assert len(answer["parts"]) >= 1 and not answer["final"]
    status, after = server.generate("a.lone-1", input_ids=[5, 6, 7], max_tokens=8, eos_id=-1)
    assert status == 200 and len(after["output_ids"]) == 8
    assert server.leave("a.lone-1", input_ids=[5, 6, 7], **long)["num_output_tokens"] > 0
    status, again = server.generate("a.lone-1", input_ids=[5, 6, 7], max_tokens=8, eos_id=-1)
    assert status == 200 and again == after and server.idle()
    assert server.metric("dmoe_requests_total", model="a.lone-1", outcome="disconnected") == 2
    assert server.metric("dmoe_committed_tokens_total", model="a.lone-1") < 2 * 480


@pytest.mark.parametrize(("body", "status", "words"), [
    ({"text_input": "x", "treshold": 0.5}, 400, "Unknown field: treshold."),
    ({"text_input": "x", "input_ids": [5]}, 400, "input_ids, messages; given: text_input, input_ids."),
    ({}, 400, "given: none."),
    ({"messages": "[{"}, 400, "messages is no JSON; give a list of messages as text."),
    ({"messages": "[" * 100000}, 400, "messages is no JSON"),
    ({"messages": "{}"}, 400, "messages must be a list of messages."),
    ({"messages": '[{"role": "tool", "content": "x"}]'}, 400, "messages.0 has the role 'tool'"),
    ({"text_input": "x", "sampling_parameters": "[1]"}, 400, "sampling_parameters must be a JSON object."),
    ({"text_input": "x", "sampling_parameters": '{"max_tokens": 3}', "max_tokens": 4}, 400, "give it once."),
    ({"text_input": "x", "temperature": -1}, 400, "temperature is -1"),
    ({"text_input": "x", "max_tokens": 5000}, 400, "answers have at most 4096 tokens."),
    ({"text_input": "x " * 3000, "max_tokens": 8}, 400, "the model has 512; shorten one of them."),
    ({"input_ids": [5, 999999]}, 400, "999999"),
    ({"text_input": "x" * (2 << 20) + "x"}, 400, "text_input has 2097153 bytes, more than 2097152."),
    ({"input_ids": [5], "exclude_input_in_output": False}, 400, "is only for text_input without stream"),
    ({"text_input": "x", "n": 2}, 400, "n is 2, but a request has one answer here"),
    ({"text_input": "x", "prompt": "y"}, 400, "prompt is no parameter."),
], ids=lambda value: str(value)[:40])
def test_bad_requests_are_refused_in_a_sentence_and_the_model_lives_on(server, body, status, words):
    got, answer = server.generate("sample", **body)
    assert (got, words in answer["error"]) == (status, True), answer
    assert server.state("sample")[0] == "READY"


def test_errors_over_grpc_and_in_streams(server):
    answers = server.grpc_streams("sample", [
        {"inputs": {"text_input": "x", "stream": True}, "parameters": {"treshold": 1}},
        {"inputs": {"text_input": "\udcff"}},
        {"inputs": {"stream": True}}])
    told = ["Unknown field: treshold.", "text_input is no text in UTF-8.", "given: none."]
    assert all(words in answer["error"][0] and not answer["parts"] for words, answer in zip(told, answers, strict=True))
    assert [answer["final"] for answer in answers] == [False] * 3  # an error has no parameters, and nothing follows
    status, events, _ = server.stream("sample", text_input="x", cache="nothing")
    assert status == 400 and len(events) == 1 and events[0]["error"].startswith("cache is nothing")
    assert server.generate("sample", text_input="what is 2 plus 3?", chat=True)[1]["text_output"] == "2 + 3 = 5"


def test_more_requests_than_it_takes_are_refused(server):
    refused, done = [], []

    def ask():
        status, answer = server.generate("a.lone-1", input_ids=[5, 6, 7], max_tokens=320, eos_id=-1)
        (done if status == 200 else refused).append((status, answer))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert done and refused and all("the most it takes" in one["error"] for _, one in refused)
    assert server.idle() and server.generate("a.lone-1", input_ids=[5], max_tokens=8)[0] == 200


def test_many_clients_that_leave_leave_nothing_behind(server):
    def leave(times):
        for _ in range(times):
            server.leave("sample", input_ids=[5, 6, 7], max_tokens=480, eos_id=-1)

    def after(times):
        """kB of the model's process once so many have left."""
        threads = [threading.Thread(target=leave, args=(times // 8,)) for _ in range(8)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
        assert server.idle()
        (kilobytes,) = server.instances("sample")
        return kilobytes

    first = after(400)
    assert after(800) < first + 2500


def test_metrics_are_at_the_servers_port(server):
    page = server.ask("GET", "/metrics", port=server.metrics)[1]
    for name in ("dmoe_running_rows", "dmoe_committed_tokens_total", "dmoe_step_seconds_bucket",
                 "dmoe_queue_seconds_sum", "nv_inference_request_success"):
        assert name in page, name
    assert server.metric("dmoe_requests_total", model="sample", outcome="eos") >= 3
    assert server.metric("dmoe_requests_total", model="sample", outcome="refused") >= 10


def test_a_model_is_loaded_anew_while_it_answers(server, generator):
    """The old instance goes on until the new one is ready; no request fails, and nothing of it is left."""
    offline = generator.generate([5, 6, 7], max_new_tokens=32, eos_id=-1)[0].token_ids
    failed, answered, over = [], [], threading.Event()

    def ask():
        while not over.is_set():
            status, answer = server.generate("sample", input_ids=[5, 6, 7], max_tokens=32, eos_id=-1)
            (answered if status == 200 and answer["output_ids"] == offline else failed).append((status, answer))

    assert len(server.instances("sample")) == 1
    threads = [threading.Thread(target=ask) for _ in range(3)]
    for one in threads:
        one.start()
    for _ in range(3):
        assert server.ask("POST", "/v2/repository/models/sample/load")[0] == 200
        count = len(answered)
        while len(answered) < count + 5 and not failed:
            pass
    over.set()
    for one in threads:
        one.join()
    assert not failed and len(answered) > 15
    end = time.monotonic() + 20
    while len(server.instances("sample")) > 1 and time.monotonic() < end:
        time.sleep(0.1)
    assert len(server.instances("sample")) == 1


def test_another_version_is_another_folder(server, repository):
    shutil.copytree(repository / "a.lone-1" / "1", repository / "a.lone-1" / "2")
    assert server.ask("POST", "/v2/repository/models/a.lone-1/load")[0] == 200
    status, answer = server.generate("a.lone-1", input_ids=[5, 6], max_tokens=1, eos_id=-1)
    assert (status, answer["model_version"]) == (200, "2") and isinstance(answer["output_ids"], int)


def test_examples_of_the_page_run(server):
    page = (REPOSITORY / "docs" / "deploy.md").read_text(encoding="utf-8")
    asked = re.findall(r"^curl .*?localhost:8000(/\S+) (?:\\\n +)?-d '(.*)'$", page, flags=re.MULTILINE)
    assert len(asked) == page.count("curl ") == 4
    for path, body in asked:
        status, answer = server.ask("POST", path, body)
        assert status == 200 and "text_output" in str(answer), answer
    (program,) = re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    program = program.replace("localhost:8001", f"127.0.0.1:{server.grpc}")
    done = subprocess.run([PYTHON, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "9 1 7 4"), done.stderr


def test_the_configuration_is_one_for_protobuf(repository):
    """Of tritonclient, which has Triton's own definition."""
    program = ("import sys\nfrom google.protobuf import text_format\nfrom tritonclient.grpc import model_config_pb2\n"
               "print(text_format.Parse(sys.stdin.read(), model_config_pb2.ModelConfig()).parameters['bundle']"
               ".string_value.encode())")
    text = model_config("m", {"bundle": '/a "b"\\c/bündel\n'})
    done = subprocess.run([PYTHON, "-c", program], input=text, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == repr('/a "b"\\c/bündel\n'.encode())


def test_unloaded_and_loaded_again(server):
    assert server.ask("POST", "/v2/repository/models/a.lone-1/unload")[0] == 200
    while server.state("a.lone-1")[0] == "READY":
        pass
    assert server.generate("a.lone-1", input_ids=[5])[0] == 404
    assert server.ask("POST", "/v2/repository/models/a.lone-1/load")[0] == 200
    assert server.generate("a.lone-1", input_ids=[5], max_tokens=8)[0] == 200


def test_what_cannot_be_loaded_is_unavailable_with_our_sentence(sample_bundle, tmp_path):
    repository = tmp_path / "repository"
    gone = tmp_path / "gone.bundle"
    shutil.copytree(sample_bundle.folder, gone)
    deploy(gone, repository)
    deploy(sample_bundle.folder, repository, "--name", "there")
    deploy(sample_bundle.folder, repository, "--name", "odd", "--prefix-cache", "1")
    shutil.rmtree(gone)
    # Of any model, a new instance that fails while the old one goes on keeps this server from ending in order.
    with triton_server(repository, tmp_path, "--load-model", "gone", "--load-model", "there", ends_with=1) as server:
        state, reason = server.state("gone")
        assert state == "UNAVAILABLE" and f"TritonModelException: {gone} is no bundle: it does not exist" in reason
        status, answer = server.generate("gone", input_ids=[5])
        assert status == 404 and "no available versions" in answer["error"]
        assert server.generate("there", input_ids=[5], max_tokens=8)[0] == 200
        status, answer = server.ask("POST", "/v2/repository/models/odd/load")
        assert status == 400 and "The prefix cache of 1 bytes must be between" in answer["error"]
        shutil.copytree(sample_bundle.folder, gone)
        assert server.ask("POST", "/v2/repository/models/gone/load")[0] == 200
        assert server.generate("gone", input_ids=[5], max_tokens=8)[0] == 200
        config = repository / "there" / "config.pbtxt"
        config.write_text(config.read_text().replace('key: "threads"', 'key: "treads"'))
        status, answer = server.ask("POST", "/v2/repository/models/there/load")
        assert status == 400 and "Parameter treads of config.pbtxt is not known" in answer["error"]
        assert server.generate("there", input_ids=[5], max_tokens=8)[0] == 200  # the old instance goes on


@pytest.mark.skipif(not NUMPY_2.exists(), reason="NumPy 2 is not there: make test-triton")
def test_numpy_2_is_refused_in_one_sentence(sample_bundle, tmp_path):
    """With this server; it would turn [1, 2, 3] into [1, 1, 1], and a text ends its process."""
    deploy(sample_bundle.folder, tmp_path / "repository", "--name", "sample")
    python = python_with(tmp_path / "python", NUMPY_2)
    with triton_server(tmp_path / "repository", tmp_path, "--load-model", "sample", python=python) as server:
        state, reason = server.state("sample")
        assert state == "UNAVAILABLE" and "TritonModelException: NumPy 2." in reason
        assert "[1, 2, 3] arrives as [1, 1, 1]; in the Python of the server, run: pip install" in reason
