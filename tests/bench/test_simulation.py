"""The simulation of replicas: nothing is lost, its batch asks what the real one asks, and simple cases are exact."""

from __future__ import annotations

import json
import time
from pathlib import Path

import gpu  # puts the benchmarks on the path
import numpy as np
import pytest
import simulate as program
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from simulation.backend import TimedBackend
from simulation.check import check
from simulation.figures import Case
from simulation.figures import simulate as figures_of
from simulation.fleet import ROUTES, Fleet, choose
from simulation.load import arrivals, clients, drawn
from simulation.measure import Measured, watched
from simulation.replicas import Replicas
from simulation.steps import WORK, StepTimes, expected_experts, fit, predicted, work

from dmoe_export.bench.serve_load import Counts, load
from dmoe_export.description import RoutingDescription
from dmoe_export.errors import CheckError, RequestError
from dmoe_export.generator import Generator
from dmoe_export.runtime.backend import ForwardInputs
from dmoe_export.runtime.cpu.backend import OnnxRuntimeBackend

PREDICTIONS = json.loads((Path(gpu.__file__).parents[2] / "benchmarks" / "predictions.json").read_text())
LENGTHS = {"prompt_tokens": (4, 80), "new_tokens": (4, 100), "steps": (1, 6)}


def times_of(model, **seconds_per):
    return StepTimes(what="test", source="measured", model=model, experts_of_block=4, seconds_per=seconds_per,
                     routing=RoutingDescription.default(model.moe))


@pytest.fixture(scope="module")
def model(tiny_bundle):
    return tiny_bundle.manifest.model


@pytest.fixture(scope="module")
def h100():
    return [predicted(PREDICTIONS, "H100", "onnxruntime-cuda ops, CUDA graphs", one, 300) for one in ("low", "high")]


def forward(rows, blocks, wanted=0):
    """Inputs of whole blocks of 32 from position 0."""
    width = 32 * blocks
    return ForwardInputs(np.zeros((rows, width), np.int64), np.tile(np.arange(width), (rows, 1)),
                         np.tile(np.arange(wanted), (rows, 1)), {})


def test_one_client_alone_takes_as_long_as_its_forwards(model):
    case = Case(replicas=1, slots=4, clients=1, requests=5, prompt_tokens=(32, 32), new_tokens=(96, 96), steps=(4, 4))
    found = figures_of(times_of(model, forward=0.01), case)
    assert found.answer.half == pytest.approx(3 * 4 * 0.01)  # prefill and commits ride in the blocks' first steps
    assert found.first_block.half == pytest.approx(4 * 0.01)
    assert found.tokens_per_second == pytest.approx(96 / 0.12) and found.tokens_per_step == pytest.approx(8)
    assert found.utilisation == pytest.approx(1) and found.rows_per_step == 1 and found.kept_up
    priced = figures_of(times_of(model, forward=0.01), case.model_copy(update={"price_per_hour": 3.6, "replicas": 2}))
    assert priced.tokens_per_second == pytest.approx(800)  # the second replica has nothing to do
    assert priced.cost_per_million_tokens == pytest.approx(2 * 3.6 / 3600 / 800 * 1e6)
    assert priced.utilisation == pytest.approx(0.5)


@settings(max_examples=12, deadline=None)
@given(replicas=st.integers(1, 3), slots=st.integers(1, 4), route=st.sampled_from(ROUTES), seed=st.integers(0, 99),
       rate=st.sampled_from([1.0, 20.0, 500.0]), most=st.sampled_from([None, 2]))
def test_every_request_ends_with_all_its_tokens(model, replicas, slots, route, seed, rate, most):
    asked = drawn(12, **LENGTHS, seed=seed)
    fleets = [Fleet(times_of(model, forward=0.01, tokens=1e-4), replicas, slots, route, most, seed) for _ in range(2)]
    first, again = (arrivals(fleet, asked, rate, seed) for fleet in fleets)
    assert first == again
    assert len(first.answers) + fleets[0].refused == 12 and (most or not fleets[0].refused)
    for answer in first.answers:
        assert answer.ended and len(answer.token_ids) == asked[answer.number].options["max_new_tokens"]
        assert 0 < answer.first_block <= answer.seconds
    for member in fleets[0].members:
        assert member.ongoing == 0 and not member.stepping
        assert all(a[1] <= b[0] + 1e-12 for a, b in zip(member.busy, member.busy[1:], strict=False))  # one at a time


def test_more_replicas_are_not_worse_and_rows_share_forwards(model):
    times = times_of(model, forward=0.01, rows=0.001)
    case = Case(replicas=1, slots=2, clients=12, requests=36, **LENGTHS)
    one, two, four = (figures_of(times, case.model_copy(update={"replicas": n})) for n in (1, 2, 4))
    assert one.tokens_per_second < two.tokens_per_second < four.tokens_per_second
    assert one.first_block.most > two.first_block.most > four.first_block.most
    assert 1.9 < one.rows_per_step <= 2 and four.utilisation <= 1
    slow = figures_of(times, Case(replicas=1, slots=4, rate=200, requests=40, **LENGTHS))
    assert not slow.kept_up and slow.utilisation == pytest.approx(1)
    easy = figures_of(times, Case(replicas=1, slots=4, rate=0.5, requests=40, **LENGTHS))
    assert easy.kept_up and easy.utilisation < 0.5


def test_the_simulated_batch_asks_what_the_real_one_asks(tiny_bundle):
    asked = load(tiny_bundle, 18, **LENGTHS, seed=1)
    times = times_of(tiny_bundle.manifest.model, forward=1)
    times = times.model_copy(update={"routing": tiny_bundle.manifest.routing})
    asks = []
    for backend in (OnnxRuntimeBackend(tiny_bundle, 1), TimedBackend(times)):
        with Generator(tiny_bundle, backend) as generator:
            measured = Measured()
            measured.add(generator, asked, rows=3, slots=3)
            asks.append([(one.position_ids.tolist(), (one.logit_rows >= 0).sum(axis=1).tolist())
                         for one in measured.inputs])  # how many places, not which: those follow the confidences
    assert asks[0] == asks[1] and len(asks[0]) > 20


def test_a_fit_finds_the_seconds_and_keeps_their_sum(model):
    rng = np.random.default_rng(0)
    did = [work(forward(rng.integers(1, 5), rng.integers(1, 4), rng.integers(0, 9)), 32, 4, 16) for _ in range(60)]
    truth = np.array([0.01, 0, 2e-4, 0, 1e-3, 0, 0])
    about = {"what": "test", "model": model, "routing": RoutingDescription.default(model.moe), "experts_of_block": 4}
    found = fit(did, [float(one @ truth) for one in did], **about)
    assert found.residual_median < 1e-6 and found.explained > 0.999999
    assert found.seconds(forward(2, 2, 3)) == pytest.approx(0.01 + 2e-4 * 128 + 1e-3 * 6)
    assert found.scaled(2).seconds(forward(2, 2, 3)) == pytest.approx(2 * found.seconds(forward(2, 2, 3)))
    noisy = [float(one @ truth) * (1 + rng.random()) for one in did]
    found = fit(did, noisy, **about)
    assert min(found.seconds_per.values()) >= 0 and found.seconds_per["forward"] > 0
    assert sum(np.array(did) @ [found.seconds_per[name] for name in WORK]) == pytest.approx(sum(noisy))
    with pytest.raises(RequestError, match="too few"):
        fit(did[:9], noisy[:9], **about)


def test_predictions_give_back_the_predicted_step(h100):
    for times, step, rides in zip(h100, (1.5e-3, 1.75e-3), ((2.0e-3, 2.6e-3),) * 2, strict=True):
        assert times.source == "predicted" and times.seconds(forward(1, 1, 32)) == pytest.approx(step)
        assert rides[0] < times.seconds(forward(1, 2, 32)) < rides[1]  # docs/gpu.md: a step that takes a block along
    assert expected_experts(2, 15, 256) == pytest.approx(30 - 15 * 15 / 256) and expected_experts(2, 0, 0) == 0
    with pytest.raises(RequestError, match="H100: tensorrt, CUDA graphs"):
        predicted(PREDICTIONS, "H300", "tensorrt", "low", 1)


def test_routes(model):
    rng = np.random.default_rng(0)
    assert choose([2, 1, 1], "least", rng) == 1
    assert {choose([5, 0], "two", rng) for _ in range(20)} == {1}
    assert {choose([0, 0, 0], "two", rng) for _ in range(60)} == {0, 1, 2}
    assert {choose([5, 0], "random", rng) for _ in range(60)} == {0, 1}
    fleet = Fleet(times_of(model, forward=0.01), 2, 2)
    borne = clients(fleet, drawn(10, **LENGTHS, seed=0), 2)
    assert len(borne.answers) >= 10 and {len(member.busy) > 0 for member in fleet.members} == {True}


class _Server:
    """Answers one token after a look at who has how much."""

    def __init__(self, log, name):
        self.log, self.name = log, name

    def _ask(self, asked, answer, over):
        self.log.append(self.name)
        answer.sent = time.perf_counter()
        answer.blocks.append((answer.sent, [1]))
        answer.ended = asked.options["max_new_tokens"] > 1

    def _counts(self):
        return Counts(3, 2, 1)

    def _metrics(self):
        return 'dmoe_step_seconds_sum{model="bench"} 1.5\n'


def test_real_replicas_are_asked_by_the_rule_and_a_missing_answer_is_an_error(tiny_bundle):
    log = []
    pair = Replicas([_Server(log, "a"), _Server(log, "b")])
    asked = load(tiny_bundle, 4, (4, 4), (2, 2), (1, 1), 0)
    found = pair.arrive(asked, 1000, 0)
    assert len(found.seen) == 4 and set(log) <= {"a", "b"} and pair._ongoing == [0, 0]
    assert pair._counts() == Counts(6, 4, 2) and pair._looks[-1] == (6, 3.0)
    with pytest.raises(CheckError, match="an answer that ends early"):
        pair.arrive(load(tiny_bundle, 1, (4, 4), (1, 1), (1, 1), 0), 1000, 0)


def test_the_program_measures_and_simulates(tiny_bundle, tmp_path):
    steps, out = tmp_path / "steps.json", tmp_path / "run.json"
    call = ["--prompt-tokens", "4-40", "--new-tokens", "4-60", "--steps", "1-3"]
    run = CliRunner().invoke(program.main, ["measure", str(tiny_bundle.folder), "--rows", "1,2", "--requests", "9",
                                            "--backend", "onnxruntime", "--threads", "1", *call, "--out", str(steps)])
    assert run.exit_code == 0, run.output
    run = CliRunner().invoke(program.main, ["run", "--steps-of", str(steps), "--replicas", "1,2", "--rates", "2,40",
                                            "--requests", "20", "--price-per-hour", "3", *call, "--out", str(out),
                                            "--markdown", "--plot", str(tmp_path / "run.png")])
    assert run.exit_code == 0, run.output
    found = json.loads(out.read_text())
    assert len(found["cases"]) == 4 and found["assumptions"] and found["steps"][0]["source"] == "measured"
    assert found["cases"][0]["figures"][0]["cost_per_million_tokens"] > 0
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    page = [line for line in run.output.splitlines() if line.startswith("| ")]
    assert page[0] == "| load | 1 | 2 |" and page[2].startswith("| 40/s |") and len(page) == 4 * 3
    for wrong, sentence in ((["run", "--replicas", "1"], "Give one of"), (["run", "--gpu", "H100", "--rates", "1"],
                                                                           "--tflops")):
        run = CliRunner().invoke(program.main, wrong)
        assert run.exit_code == 2 and sentence in run.output
    run = CliRunner().invoke(program.main, ["run", "--steps-of", str(steps), "--rates", "1e9", "--requests", "9"])
    assert isinstance(run.exception, RequestError) and "give more --requests" in str(run.exception)
    for text in ("x", "0", "1,inf", "1.5"):
        with pytest.raises(RequestError):
            program._whole(text)
    for text in ("4-", "9-3", "0-3", "a", "-4"):
        with pytest.raises(RequestError):
            program._range(text)


def test_watching_ends(tiny_bundle):
    with Generator(tiny_bundle, OnnxRuntimeBackend(tiny_bundle, 1)) as generator:
        backend = generator.backend
        with watched(generator) as seen:
            assert generator.backend is seen and seen.name == "onnxruntime"
        assert generator.backend is backend


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_real_servers_do_as_many_steps_as_simulated(tmp_path):
    found = check(tmp_path, 1, 6, (16, 64), (32, 64), (2, 4), 0, minutes=1)
    assert found.rounds == 1 and len(found.alone) == len(found.beside) == 1
    assert {(one.replicas, one.clients) for one in found.results} == {(1, 1), (1, 2), (1, 4), (2, 2), (2, 4), (2, 8),
                                                                      (2, None)}
    for one in found.results:
        if one.clients:  # seconds are the machine's affair; how the requests share their steps is not
            assert one.ratio["tokens_per_step"] == pytest.approx(1, abs=0.2)
    alone = next(one for one in found.results if (one.replicas, one.clients) == (1, 1))
    assert alone.ratio["tokens_per_step"] == pytest.approx(1, abs=0.01)
