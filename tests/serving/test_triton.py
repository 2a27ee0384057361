"""The model of Triton's Python backend over a stand-in for its module, and a toy generator."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import pickle
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from serving import Held, toy_generator

from dmoe_export.decoding.settings import OPTIONS
from dmoe_export.decoding.template import Gap
from dmoe_export.deploy.triton import INPUTS, MODEL_FILE, OUTPUTS
from dmoe_export.errors import BundleError, MissingRequirementError, NotFiniteError, RequestError
from dmoe_export.serving.engine import Engine
from dmoe_export.serving.errors import ApiError

LONG = {"max_tokens": 40, "eos_id": -1}
LABELS = ("model", "toy"), ("version", "3"), ("instance", "toy_0_0")


class Tensor:
    corrupt = False  # as NumPy 2 with the backend of Triton 2.51

    def __init__(self, name, array):
        self._name, self._array = name, array

    def name(self):
        return self._name

    def as_numpy(self):
        return self._array

    def to_dlpack(self):
        return self._array

    @classmethod
    def from_dlpack(cls, name, capsule):
        return cls(name, np.full_like(capsule, capsule[0]) if cls.corrupt else capsule)


class Failed(Exception):
    """TritonModelException"""


class TritonError:
    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, CANCELLED = range(6)

    def __init__(self, message, code):
        self.message, self.code = message, code


class MetricFamily:
    COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"
    made, off = {}, False

    def __init__(self, name, description, kind):
        if self.off:
            raise Failed("metrics not supported")
        assert name not in self.made and description.endswith(".")
        self.name, self.kind, self.values = name, kind, {}
        self.made[name] = self

    def Metric(self, labels, buckets=None):
        assert (buckets is not None) == (self.kind == "histogram") and tuple(labels.items()) not in self.values
        values = self.values[tuple(labels.items())] = []
        add = {"counter": "increment", "gauge": "set", "histogram": "observe"}[self.kind]
        return SimpleNamespace(**{add: values.append})


PB = SimpleNamespace(
    Tensor=Tensor, TritonError=TritonError, MetricFamily=MetricFamily, TritonModelException=Failed,
    TRITONSERVER_RESPONSE_COMPLETE_FINAL=1,
    InferenceResponse=lambda tensors=(), error=None: SimpleNamespace(
        tensors={one.name(): one.as_numpy().tolist() for one in tensors}, error=error),
    Logger=SimpleNamespace(**{f"log_{kind}": lambda text, kind=kind: LOG.append((kind, text))
                              for kind in ("info", "warn", "error")}))
LOG = []


class Request:
    """A request, and its sender."""

    def __init__(self, parameters=None, id="", **inputs):
        self.sent, self.over, self.cancelled = [], threading.Event(), False
        self._parameters, self._id = json.dumps((parameters or {}) | ({"id": id} if id else {})), id
        self._inputs = [Tensor(name, value if isinstance(value, np.ndarray) else np.array(
            [value.encode() if isinstance(value, str) else value], np.object_ if isinstance(value, str) else bool))
            for name, value in inputs.items()]

    def inputs(self):
        return self._inputs

    def parameters(self):
        return self._parameters

    def request_id(self):
        return self._id

    def get_response_sender(self):
        return self

    def is_cancelled(self):
        assert not self.over.is_set(), "asked for a request that has ended"
        return self.cancelled

    def send(self, response=None, flags=0):
        assert not self.over.is_set(), "a response after the last"
        self.sent.append(response)
        if flags:
            self.over.set()

    def parts(self):
        """Outputs of each response, once all are there."""
        assert self.over.wait(30)
        assert not [one.error.message for one in self.sent if one.error]
        return [one.tensors for one in self.sent]

    def error(self):
        """(message, code) of the last."""
        assert self.over.wait(30) and self.sent[-1].error and not self.sent[-1].tensors
        return self.sent[-1].error.message, self.sent[-1].error.code


def ids(*token_ids):
    return np.array(token_ids or (5, 6, 7), np.int64)


@pytest.fixture
def triton(monkeypatch):
    """dmoe_export.serving.triton over the stand-in."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", PB)
    monkeypatch.setattr(MetricFamily, "made", {})
    monkeypatch.setattr(logging.getLogger("dmoe_export"), "handlers", [])
    from dmoe_export.serving.triton import model as found

    LOG.clear()
    return found


@contextmanager
def model_of(triton, monkeypatch, free=True, kind="CPU", **parameters):
    backend, opened = Held(), {}
    if free:
        backend.free.set()

    def open_engine(name, bundle, *, slots, metrics, max_waiting, prefix_cache, **opening):
        opened.update(opening, bundle=bundle, slots=slots, max_waiting=max_waiting)
        return Engine(name, toy_generator(backend), slots or 2, max_waiting, metrics, prefix_cache)

    monkeypatch.setattr(triton, "open_engine", open_engine)
    config = {"parameters": {name: {"string_value": value} for name, value in ({"bundle": "/b"} | parameters).items()}}
    model = triton.TritonPythonModel()
    model.initialize({"model_config": json.dumps(config), "model_name": "toy", "model_version": "3",
                      "model_instance_kind": kind, "model_instance_name": "toy_0_0", "model_instance_device_id": "0"})
    model.backend, model.opened = backend, opened
    try:
        yield model
    finally:
        backend.free.set()
        model.finalize()


def offline(prompt=(5, 6, 7), **options):
    backend = Held()
    backend.free.set()
    return toy_generator(backend).generate(list(prompt), max_new_tokens=40, eos_id=-1, **options)[0].token_ids


def test_a_response_per_block_or_one_for_all_and_the_last_is_marked(triton, monkeypatch):
    with model_of(triton, monkeypatch) as model:
        stream, whole = Request(LONG, stream=True, input_ids=ids()), Request(LONG, input_ids=ids(), id="x")
        hot = Request(LONG | {"temperature": 1.0}, input_ids=ids(), sampling_parameters='{"seed": 3}')
        model.execute([stream, whole, hot])
        parts = stream.parts()
        assert [i for part in parts for i in part["output_ids"]] == offline() and len(parts) > 5
        assert [part["finish_reason"] for part in parts] == [[b""]] * (len(parts) - 1) + [[b"length"]]
        assert all(part["num_output_tokens"] == [len(part["output_ids"])] and part["num_input_tokens"] == [3] and
                   part["text_output"] == [b""] for part in parts)  # no tokenizer
        (part,) = whole.parts()
        assert part["output_ids"] == offline() and part["num_output_tokens"] == [40]
        assert hot.parts()[0]["output_ids"] == offline(temperature=1.0, seed=3)


def test_configuration_and_model_have_the_same_tensors(triton, monkeypatch):
    from dmoe_export.serving.triton.request import INPUTS as READ

    with model_of(triton, monkeypatch) as model:
        model.execute([request := Request({"max_tokens": 4}, input_ids=ids())])
        assert [name for name, _, _ in OUTPUTS] == list(request.parts()[0])
    assert [name for name, _, _ in INPUTS] == sorted(READ, key=[name for name, _, _ in INPUTS].index)


@pytest.mark.parametrize(("request_", "words"), [
    (Request({"treshold": 0.5}, input_ids=ids()), "Unknown field: treshold."),
    (Request(input_ids=ids(), text_input="x"), "given: text_input, input_ids."),
    (Request(), "given: none."),
    (Request({"id": "other"}, input_ids=ids()), "Unknown field: id."),
    (Request({"chat": 1}, text_input="x"), "chat is '1', it must be true or false."),
    (Request({"stream": True}, input_ids=ids()), "stream is no parameter."),
    (Request(text_input="x"), "has no tokenizer"),
    (Request(LONG | {"temperature": "hot"}, input_ids=ids()), "temperature is 'hot', it must be a number."),
    (Request(LONG, input_ids=ids(5, 900)), "900"),
    (Request(input_ids=np.zeros(2**21, np.int64)), "input_ids has 16777216 bytes, more than 2097152."),
    (Request({"max_tokens": 41}, input_ids=ids()), "this server's answers have at most 40 tokens."),
    (Request(text_input=np.array([b"x", b"y"], np.object_)), "text_input has 2 values, it takes one."),
    (Request(text_input=np.array([b"\xff"], np.object_)), "text_input is no text in UTF-8."),
    (Request(messages='"x"'), "messages must be a list of messages."),
    (Request(messages="[]"), "messages: "),
    (Request(messages='[{"role": "user", "content": "x", "tool_calls": [1]}]'), "messages.0 has the field tool_calls"),
    (Request(LONG, input_ids=ids(), sampling_parameters="{"), "sampling_parameters is no JSON; give a JSON object"),
    (Request(LONG, input_ids=ids(), sampling_parameters='{"max_tokens": 4}'), "max_tokens has one value as a pa"),
    (Request(LONG | {"n": 3}, input_ids=ids()), "n is 3, but a request has one answer here; leave it out."),
    (Request({"logprobs": 0}, input_ids=ids()), "no output of Triton has place for it; leave it out."),
    (Request(input_ids=ids(), exclude_input_in_output=False), "is only for text_input without stream; leave it out."),
    (Request(text_input="x", exclude_input_in_output=False, stream=True), "is only for text_input without stream;"),
], ids=lambda value: value[:40] if isinstance(value, str) else "")
def test_bad_requests_get_an_error_that_says_why(triton, monkeypatch, request_, words):
    with model_of(triton, monkeypatch, max_new_tokens="40") as model:
        model.execute([request_, good := Request({"max_tokens": 4}, input_ids=ids())])
        message, code = request_.error()
        assert words in message and code == TritonError.INVALID_ARG and len(request_.sent) == 1
        assert len(good.parts()) == 1
        assert MetricFamily.made["dmoe_requests_total"].values[(*LABELS, ("outcome", "refused"))] == [1.0]


def test_numbers_may_be_texts_and_settings_given_twice(triton, monkeypatch):
    """As the sample client of Triton's vLLM backend does."""
    given = {"temperature": "1.0", "top_p": "0.9", "seed": "3", "max_tokens": "40", "eos_id": "-1", "top_k": "+5"}
    with model_of(triton, monkeypatch) as model:
        model.execute([request := Request(given, input_ids=ids(), sampling_parameters=json.dumps(given))])
        (part,) = request.parts()
        assert part["output_ids"] == offline(temperature=1.0, top_p=0.9, seed=3, top_k=5)
        for name, value in (("temperature", "0x1"), ("seed", "1.0"), ("early_stop", "true"), ("cache", "1")):
            model.execute([request := Request({name: value}, input_ids=ids())])
            assert request.error()[0].startswith(f"{name} is ")


def test_given_places_are_settings_of_a_request(triton, monkeypatch):
    parts = [{"gap": 6}, [8, 9], {"gap": 3}, [10]]
    with model_of(triton, monkeypatch, max_new_tokens="40") as model:
        whole, stream = (Request(input_ids=ids(), stream=stream, sampling_parameters=json.dumps({"template": parts}))
                         for stream in (False, True))
        model.execute([whole, stream])
        wanted = toy_generator(model.backend).infill([[5, 6, 7], Gap(6), [8, 9], Gap(3), [10]])[0].answer.token_ids
        (part,) = whole.parts()
        assert part["output_ids"] == wanted and part["finish_reason"] == [b"stop"]
        assert part["num_output_tokens"] == [9] and part["num_input_tokens"] == [6]
        assert [i for one in stream.parts() for i in one["output_ids"]] == wanted
        for parameters, words in (({"infill": parts}, "infill is not offered here; give what is before its first gap"),
                                  ({"template": [[5]]}, "template has no gap"),
                                  ({"template": [{"gap": 41}]}, "template makes an answer of at least 41 places"),
                                  ({"suffix": "x"}, "has no tokenizer for the text of a template; give token ids."),
                                  ({"suffix": "x", "chat": True}, "suffix belongs to a prompt that goes through no")):
            model.execute([request := Request(input_ids=ids(), sampling_parameters=json.dumps(parameters))])
            assert words in request.error()[0] and request.error()[1] == TritonError.INVALID_ARG


def test_values_for_the_chat_template_go_with_messages(triton):
    """The request holds them, pickled, too: so they reach a replica, as on Ray."""
    from dmoe_export.serving.triton.request import wanted_of

    inputs = {"sampling_parameters": json.dumps({"max_tokens": 4, "chat_template_kwargs": {"enable_thinking": False}})}
    wanted = wanted_of("toy", inputs | {"messages": '[{"role": "user", "content": "x"}]'}, "{}", "")
    ask = pickle.loads(pickle.dumps(asyncio.run(wanted.ask(None, 256, 60.0))))
    assert ask.chat and ask.chat_template_kwargs == {"enable_thinking": False}
    with pytest.raises(ApiError, match="chat_template_kwargs is not offered here; leave it out"):
        wanted_of("toy", inputs | {"text_input": "x"}, '{"chat": true}', "")


def test_schemas_go_as_text_or_in_the_sampling_parameters(triton):
    from dmoe_export.serving.triton.request import wanted_of

    text, schema = {"text_input": "x"}, {"type": "object", "properties": {"é": {"enum": [1, "a"]}}}
    wanted = wanted_of("toy", text, json.dumps({"json_schema": json.dumps(schema), "max_tokens": "9"}), "")
    assert wanted.body.options() == {"json_schema": json.dumps(schema), "max_new_tokens": 9}
    said = {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}}
    wanted = wanted_of("toy", text | {"sampling_parameters": json.dumps(said)}, "{}", "")
    assert wanted.body.options() == {"json_schema": schema}
    assert wanted_of("toy", text, '{"regex": "[0-9]+"}', "").body.options() == {"regex": "[0-9]+"}


def test_every_option_of_a_request_may_be_given(triton, monkeypatch):
    with model_of(triton, monkeypatch) as model:
        for name in OPTIONS:
            value = {"x": 1} if name != "json_schema" else [1]
            odd = Request(input_ids=ids(), sampling_parameters=json.dumps({name: value}))
            model.execute([odd])
            assert odd.error()[0].startswith(f"{name} is "), odd.error()


def test_a_client_that_leaves_frees_its_place(triton, monkeypatch):
    with model_of(triton, monkeypatch, free=False, max_batch="1") as model:
        gone, waiting, next_ = (Request(LONG, stream=True, input_ids=ids()) for _ in range(3))
        model.execute([gone, waiting, next_])
        while not model.backend.seen and len(model._engine.jobs) < 3:
            time.sleep(0.01)
        gone.cancelled = waiting.cancelled = True
        model.backend.free.set()
        assert gone.error() == waiting.error() == ("The request was cancelled by its client.", TritonError.CANCELLED)
        assert len(gone.sent) <= 3 and len(waiting.sent) == 1
        assert [i for part in next_.parts() for i in part["output_ids"]] == offline()


def test_failures_end_their_request_with_a_sentence_and_nothing_else(triton, monkeypatch):
    with model_of(triton, monkeypatch) as model:
        model.backend.fail = NotFiniteError("/somewhere/toy.bundle computes NaN; check it.")
        model.execute([bad := Request(LONG, input_ids=ids())])
        assert bad.error() == ("toy computes NaN; check it.", TritonError.INTERNAL)
        model.backend.fail = None
        monkeypatch.setattr(triton, "wanted_of", lambda *_: 1 / 0)
        model.execute([odd := Request(LONG, input_ids=ids(), id="i7")])
        assert odd.error()[0].startswith("The server failed on this request") and odd.error()[1] == TritonError.INTERNAL
        monkeypatch.undo()
        assert ("error", "request i7 failed: ZeroDivisionError at") in [(kind, text.split(": ", 1)[1][:40].rstrip())
                                                                       for kind, text in LOG if "i7" in text]
        model.execute([good := Request(LONG, input_ids=ids())])
        assert good.parts()[0]["output_ids"] == offline() and model.is_ready()
        model.backend.fail = BundleError("/somewhere/toy.bundle lost a file.")
        model.execute([lost := Request(LONG, input_ids=ids())])
        assert lost.error() == ("toy lost a file.", TritonError.INTERNAL) and not model.is_ready()


def test_a_full_queue_is_unavailable_and_unloading_lets_requests_end(triton, monkeypatch):
    with model_of(triton, monkeypatch, free=False, max_batch="1", max_waiting="1") as model:
        requests = [Request(LONG, input_ids=ids(), id="same") for _ in range(4)]
        model.execute(requests)
        while sum(one.over.is_set() for one in requests) < 2:
            time.sleep(0.01)
        refused = [one for one in requests if one.over.is_set()]
        said = "Model toy has 2 requests, the most it takes; try again later."
        assert [one.error() for one in refused] == [(said, TritonError.UNAVAILABLE)] * 2
        model.backend.free.set()
    answered = [one.parts() for one in requests if one not in refused]  # after finalize
    assert [one[0]["output_ids"] for one in answered] == [offline()] * 2


def test_unloading_cancels_what_does_not_end(triton, monkeypatch):
    with model_of(triton, monkeypatch, free=False, drain_seconds="0") as model:
        model.execute([request := Request(LONG, stream=True, input_ids=ids())])
        while not model._engine.jobs:
            time.sleep(0.01)
        threading.Timer(0.2, model.backend.free.set).start()
    assert request.parts()[-1]["finish_reason"] == [b"cancelled"]


def test_metrics_are_triton_s(triton, monkeypatch):
    with model_of(triton, monkeypatch) as model:
        model.execute([request := Request(LONG, input_ids=ids())])
        request.parts()
    made = {name: (family.kind, family.values.get(LABELS)) for name, family in MetricFamily.made.items()}
    assert made["dmoe_committed_tokens_total"][0] == "counter" and sum(made["dmoe_committed_tokens_total"][1]) == 40
    assert made["dmoe_running_rows"][0] == "gauge" and made["dmoe_running_rows"][1][-1] == 0
    assert made["dmoe_step_seconds"][0] == "histogram" and len(made["dmoe_step_seconds"][1]) > 5
    assert MetricFamily.made["dmoe_requests_total"].values[(*LABELS, ("outcome", "length"))] == [1.0]
    assert not [name for name in made if "created" in name] and len(made) == 17


def test_a_server_without_metrics_is_no_error(triton, monkeypatch):
    monkeypatch.setattr(MetricFamily, "off", True)
    with model_of(triton, monkeypatch) as model:
        model.execute([request := Request(LONG, input_ids=ids())])
        assert request.parts()[0]["output_ids"] == offline()
    assert ("warn", "dmoe-export: there are no metrics of toy_0_0: metrics not supported") in LOG


def test_numpy_that_does_not_fit_is_refused_by_what_it_does(triton, monkeypatch):
    monkeypatch.setattr(Tensor, "corrupt", True)
    told = r"NumPy \S+ does not fit .* \[1, 2, 3\] arrives as \[1, 1, 1\]; .*'numpy>=1.26,<2'"
    with pytest.raises(Failed, match=told), model_of(triton, monkeypatch):
        pass


def test_parameters_of_the_configuration(triton, monkeypatch):
    given = {"threads": "2", "expert_budget": "50%", "max_batch": "4", "max_waiting": "0",
             "memory": "8G", "FORCE_CPU_ONLY": "yes"}
    with model_of(triton, monkeypatch, **given) as model:
        assert model.opened == {"threads": 2, "expert_budget": "50%", "backend": "onnxruntime", "bundle": "/b",
                                "slots": 4, "max_waiting": 0, "memory": "8G"}
    assert ("info", "dmoe-export: toy: /b on toy (as given), 4 answers at once") in LOG
    for name, value, words in [("threads", "two", "'two', which is no number."), ("threads", "0", "at least 1."),
                               ("timeout", "0", "it must be above 0."), ("treads", "2", "is not known; known: bundle"),
                               ("backend", "tensorrt", "KIND_CPU; leave it out")]:
        with pytest.raises(Failed, match=f"Parameter {name} of config.pbtxt .*{words}"), \
                model_of(triton, monkeypatch, **{name: value}):
            pass


def test_an_instance_has_its_gpu_and_no_other(triton, monkeypatch):
    from dmoe_export.serving.triton.settings import check_device, choose_device, settings_of

    for seen, number, expected in [(None, 1, "1"), ("3,5", 1, "5"), ("GPU-ab", 0, "GPU-ab")]:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen) if seen else monkeypatch.delenv("CUDA_VISIBLE_DEVICES", False)
        choose_device("CPU", number)
        assert os.environ.get("CUDA_VISIBLE_DEVICES") == seen
        choose_device("GPU", number)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == expected
    assert settings_of({"bundle": "b"}, "GPU").opening == {}
    assert settings_of({"bundle": "b", "preset": "speed"}, "GPU").opening == {"preset": "speed"}
    generator = SimpleNamespace(backend=SimpleNamespace(name="onnxruntime"), backend_choice="there is no GPU")
    check_device("CPU", generator)
    with pytest.raises(MissingRequirementError, match=r"KIND_GPU, but the bundle runs on the CPU \(there is no GPU\)"):
        check_device("GPU", generator)
    with pytest.raises(RequestError, match=r"Parameter bundle of config\.pbtxt is missing"):
        settings_of({}, "CPU")


def test_a_server_s_python_without_the_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "dmoe_export.serving.triton.model", None)
    with pytest.raises(ImportError, match=r"not installed in the Python of this Triton server \(.*python.*cpu or gpu"):
        exec(MODEL_FILE, {})


def test_nothing_of_triton_is_imported_unless_used():
    code = ("import sys, dmoe_export.cli.serve, dmoe_export.cli.deploy_triton, dmoe_export.serving.app\n"
            "print([one for one in sys.modules if 'triton' in one])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['dmoe_export.deploy.triton', 'dmoe_export.cli.deploy_triton']"
