"""The GPU tests' own code, run on the emulated kernels and the stand-in for CUDA: small sizes, the same functions.

What these checks prove about the kernels is proved better by test_kernels_*.py; here they must run, pass, and fail.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import kernel_helpers
import numpy as np
import pytest
from conftest import SAMPLE
from device_helpers import host_backend
from fake_cudart import HostDevice
from gpu import expert_checks, replay, route_checks, sanitizer_driver
from gpu import test_gpu_generation as generation_tests
from gpu import test_gpu_sanitizer as sanitizer_tests
from gpu.conftest import missing_custom_ops
from gpu.expert_checks import ExpertCase, QuantisedCase, odd_ids, routed_ids
from gpu.spaces import emulated_space
from gpu_common import LIBRARY, gpu_missing

from dmoe_export.errors import MissingRequirementError
from dmoe_export.runtime.cpu.backend import OnnxRuntimeBackend


@pytest.fixture(scope="module")
def space():
    return emulated_space(HostDevice(), Path(kernel_helpers.library()._name))


@pytest.mark.parametrize("number", range(18))
def test_recorded_gates(space, golden, number):
    route_checks.check_gate(space, golden, number)


@pytest.mark.parametrize("number", range(16))
def test_gates_of_pools(space, golden, number):
    route_checks.check_pool_gate(space, golden.parent / "top_c", number)


def test_random_routing(space):
    compared = [route_checks.check_route(space, case) for case in route_checks.random_cases(30, 1, 100)]
    assert sum(c for c, _ in compared) > 0.9 * sum(n for _, n in compared), "most tokens must be decided, not excused"


@pytest.mark.parametrize("mode", ["token", "top_p", "top_c"])
def test_routing_at_model_size(space, mode):
    compared, tokens = route_checks.check_route(space, route_checks.sized_case(256, 8, 8, 4, 32, mode, 32))
    assert compared > 0.9 * tokens


def test_only_near_ties_are_excused(space, monkeypatch):
    """A token whose ids differ is asked for; where the eager op stays with its answer, the check fails."""
    case = route_checks.sized_case(24, 4, 4, 2, 8, "token", 21)
    run, asked = route_checks.run_route, []

    def wrong(*args, **how):
        ids, weights, coreset = run(*args, **how)
        ids[0, 3, :2] = ids[0, 3, 1::-1]
        return ids, weights, coreset

    monkeypatch.setattr(route_checks, "run_route", wrong)
    with pytest.raises(AssertionError):
        route_checks.check_route(space, case)
    sure = np.ones((2, 21), bool)
    sure[0, 3] = False
    monkeypatch.setattr(route_checks, "_sure", lambda *_: asked.append(1) or sure)
    assert route_checks.check_route(space, case) == (41, 42) and asked == [1]
    monkeypatch.setattr(route_checks, "run_route", run)
    assert route_checks.check_route(space, case) == (42, 42) and asked == [1], "nobody differs, so nobody is asked"


def test_routing_without_coreset_and_in_a_graph(space):
    case = route_checks.sized_case(24, 4, 4, 2, 8, "top_p", 21)
    route_checks.check_route(space, case, with_coreset=False)
    route_checks.check_route(space, case, graph=True)
    route_checks.check_same_bits(space, case, runs=2)


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
@pytest.mark.parametrize(("tokens", "experts", "active"), [(1, 12, 3), (33, 64, 9), (40, 7, 7)])
def test_experts(space, kind, tokens, experts, active):
    case = ExpertCase(kind, routed_ids(tokens, 3, experts, active, empty=0.1), experts, 136, 40)
    assert len(case.active) <= active
    error = expert_checks.check_experts(space, case)
    assert error > 1e-5, "a reference that equals 16-bit results cannot be a float64 one"


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_odd_ids_and_no_ids(space, kind):
    for tokens in (1, 7, 30):
        expert_checks.check_experts(space, ExpertCase(kind, odd_ids(tokens, 4, 10), 10, 40, 24))
    expert_checks.check_experts(space, ExpertCase(kind, np.full((5, 2), -1), 4, 16, 8))


def test_same_bits_and_graphs(space):
    case = ExpertCase("fp16", routed_ids(19, 2, 6, 5), 6, 72, 24)
    expert_checks.check_same_bits(space, case, runs=2)
    expert_checks.check_graph_follows_inputs(space, case)


def test_no_tokens(space):
    loaded = expert_checks.LoadedExperts(space, ExpertCase("fp16", np.zeros((0, 2), int), 4, 16, 8))
    assert loaded.run().shape == (0, 16)


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_experts(space, kind, bits):
    for tokens, group in ((1, 32), (33, 64)):
        case = QuantisedCase(kind, routed_ids(tokens, 3, 12, 7, empty=0.1), 12, 192, 64, bits=bits, group=group)
        assert expert_checks.check_experts(space, case) > 1e-5
    expert_checks.check_same_bits(space, case, runs=2)
    expert_checks.check_graph_follows_inputs(space, case)


def test_every_place_is_taken_when_places_suffice():
    for tokens, active in ((32, 80), (32, 10), (512, 256)):
        ids = routed_ids(tokens, 8, 256, active)
        assert len(np.unique(ids)) == active
        assert all(len(set(row)) == 8 for row in ids.tolist())


class TestChecksCanFail:
    """Each check meets the error it is there for."""

    def test_a_wrong_expert(self, space):
        case = ExpertCase("fp16", routed_ids(9, 2, 6, 6), 6, 40, 16)
        loaded = expert_checks.LoadedExperts(space, case)
        ids = case.ids.copy()
        ids[4, 1] = (ids[4, 1] + 1) % 6 if (ids[4, 1] + 1) % 6 != ids[4, 0] else (ids[4, 1] + 2) % 6
        loaded.inputs[1].put(ids, space.stream)
        assert expert_checks.relative_error(case, loaded.run()) > expert_checks.BOUNDS["fp16"]

    def test_an_inactive_expert(self, space):
        """Reading one gives NaN."""
        case = ExpertCase("fp16", np.array([[0, 1]]), 3, 16, 8)
        loaded = expert_checks.LoadedExperts(space, case)
        loaded.inputs[1].put(np.array([[0, 2]]), space.stream)
        loaded.inputs[2].put(np.ones((1, 2)), space.stream)
        assert expert_checks.relative_error(case, loaded.run()) == float("inf")

    @pytest.mark.parametrize(("bits", "wrong"), [(4, {"scales": 1}), (8, {"scales": 1}), (4, {"words": 1})])
    def test_quantised_weights_that_are_off(self, space, bits, wrong):
        """Every scale that of the next row; every pair of integers of 4 bits the other way round."""
        case = QuantisedCase("fp16", routed_ids(9, 2, 3, 3), 3, 64, 64, bits=bits, group=32)
        loaded = expert_checks.LoadedExperts(space, case)
        for expert in range(3):
            gate_up, _, scales, _ = case.stored(expert)
            if "scales" in wrong:
                loaded.scales[0].put_row(expert, np.roll(scales, 1, axis=0), space.stream)
            else:
                loaded.gate_up.put_row(expert, gate_up >> 4 | gate_up << 4, space.stream)
        assert expert_checks.relative_error(case, loaded.run()) > expert_checks.BOUNDS["fp16"]

    def test_an_unwritten_output(self, space):
        case = ExpertCase("fp16", np.array([[0, 1]]), 3, 16, 8)
        assert expert_checks.relative_error(case, np.full((1, 16), 0xFFFF, np.uint16)) == float("inf")

    def test_a_write_behind_the_end(self, space):
        array = space.empty((5,), np.float32)
        space.device.fill(array.address + array.size, 0, 1, space.stream)
        with pytest.raises(AssertionError, match="behind the end"):
            array.get(space.stream)

    @pytest.mark.parametrize("change", [{"top_p": 0.2}, {"min_experts": 60}])
    def test_another_coreset(self, space, monkeypatch, change):
        settings = {"top_p": 0.9, "min_experts": 4}
        case = dataclasses.replace(route_checks.sized_case(64, 4, 8, 4, 8, "top_p", 16), settings=settings)
        want = route_checks.eager(case)
        monkeypatch.setattr(route_checks, "_sure", lambda *_: np.ones((2, 16), bool))
        monkeypatch.setattr(route_checks, "eager", lambda _: want)
        with pytest.raises(AssertionError):
            route_checks.check_route(space, dataclasses.replace(case, settings={**settings, **change}))


def test_the_sanitizer_driver_runs(space):
    assert sanitizer_driver.main(space.device, space.library, space.device.fake.enqueue) == 38


def test_the_sanitizer_driver_needs_a_gpu():
    if gpu_missing() is None:
        pytest.skip("this machine has a GPU")
    run = subprocess.run([sys.executable, sanitizer_driver.__file__], text=True, capture_output=True, check=False)
    assert run.returncode == 3 and run.stderr.count("\n") == 1 and "NVIDIA" in run.stderr


@pytest.mark.parametrize(("says", "code", "ends"), [
    ("27 calls were fine\n== ERROR SUMMARY: 0 errors", 0, None), ("== ERROR SUMMARY: 3 errors", 9, AssertionError),
    ("27 calls were fine", 0, AssertionError), ("Error: Device not supported", 1, pytest.skip.Exception)])
def test_the_sanitizer_s_verdict_is_read(tmp_path, monkeypatch, says, code, ends):
    tool, found = tmp_path / "compute-sanitizer", {}
    tool.write_text(f"#!/bin/sh\nprintf '{says}\\n'\nexit {code}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ends) if ends else contextlib.nullcontext():
        sanitizer_tests.test_sanitizer_finds_nothing(LIBRARY, None, found.__setitem__, "memcheck")
    if code != 1:
        assert found["sanitizer memcheck"]["exit"] == code and found["sanitizer memcheck"]["seconds"] > 0


def test_missing_custom_ops_fail_where_they_are_required(monkeypatch):
    with pytest.raises(pytest.skip.Exception, match="no library"):
        missing_custom_ops("no library")
    monkeypatch.setenv("DMOE_REQUIRE_CUSTOM_OPS", "1")
    with pytest.raises(pytest.fail.Exception, match=r"DMOE_REQUIRE_CUSTOM_OPS=1, but .* no library"):
        missing_custom_ops("no library")


@pytest.fixture(scope="module")
def prompts(sample_bundle):
    return replay.sample_prompts(sample_bundle, SAMPLE, 8)


class TestReplay:
    """Comparing backends forward by forward, with the CPU provider behind the stand-in device as the other backend."""

    def test_equal_backends(self, sample_bundle, prompts):
        recording = replay.record(OnnxRuntimeBackend(sample_bundle), [[prompt] for prompt in prompts])
        report = replay.compare(recording, host_backend(sample_bundle))
        replay.check(report, 1e-5)
        assert report["generations_equal"] == 8 and report["token_layers_with_other_experts"] == 0

    def test_a_batch_whose_rows_end_apart(self, sample_bundle, prompts):
        recording = replay.record(OnnxRuntimeBackend(sample_bundle), [replay.odd_batch(prompts)], **replay.ODD)
        backend = host_backend(sample_bundle, cuda_graphs=True)
        report = replay.compare(recording, backend)
        replay.check(report, 1e-5)
        assert report["generations_equal"] == 3 and replay.ends(recording) >= 2 and backend.graphs.replayed > 0
        assert len({sizes.past for sizes in backend.executor.sizes}) >= 3, "the cache should have grown over buckets"

    def test_the_gpu_tests_run(self, sample_bundle, prompts, monkeypatch):
        """Those of ONNX Runtime's CUDA provider, with the stand-in in its place."""
        def open_one(bundle, device, graphs, ops):
            if ops == "on":
                raise MissingRequirementError("no library")
            return host_backend(bundle, cuda_graphs=graphs)

        monkeypatch.setattr(generation_tests, "open_onnxruntime_cuda", open_one)
        cpu, found = OnnxRuntimeBackend(sample_bundle), {}
        recorded = replay.record(cpu, [[prompt] for prompt in prompts])
        odd, keep = replay.record(cpu, [replay.odd_batch(prompts)], **replay.ODD), found.__setitem__
        generation_tests.test_onnxruntime_cuda(sample_bundle, recorded, None, keep, "off")
        generation_tests.test_onnxruntime_cuda_steps_recorded(sample_bundle, recorded, odd, None, keep, "off")
        generation_tests.test_onnxruntime_cuda_rows_end_apart(sample_bundle, odd, None, keep)
        assert found["placement fp32 ops=off"] and found["graphs onnxruntime-cuda fp32 ops=off"]["replayed"] > 0
        with pytest.raises(pytest.skip.Exception, match="custom ops compute in fp16"):
            generation_tests.test_onnxruntime_cuda(sample_bundle, recorded, None, keep, "on")

    def test_a_flip_is_found_and_judged(self, sample_bundle, prompts):
        class Wrong(type(host_backend(sample_bundle))):
            """Answers one place of one forward with another token."""

            count = 0

            def forward(self, inputs, cache):
                outputs = super().forward(inputs, cache)
                self.count += bool((inputs.logit_rows >= 0).any())
                if self.count == 5:
                    outputs.token_ids[0, 0] = (outputs.token_ids[0, 0] + 1) % 50
                return outputs

        recording = replay.record(OnnxRuntimeBackend(sample_bundle), [[prompt] for prompt in prompts])
        backend = host_backend(sample_bundle)
        backend.__class__ = Wrong
        report = {"prompts": 8, "generations_equal": 8, **replay.replay(recording.steps, backend)}
        (flip,) = report["flips"]
        assert flip["token"] == (flip["reference_token"] + 1) % 50 and flip["margin"] > 0.1
        with pytest.raises(AssertionError, match="margin"):
            replay.check(report, 0.1)


def test_rtx_finding_builds_without_a_gpu_and_says_how_far_it_came(half_sample_bundle):
    pytest.importorskip("tensorrt_rtx_bindings")
    if not LIBRARY.is_file():
        pytest.skip("the plugin library is not built")
    script = Path(expert_checks.__file__).parent / "rtx_finding.py"
    run = subprocess.run([sys.executable, script, half_sample_bundle.folder, "default"], text=True,
                         capture_output=True, check=False)
    stages = [json.loads(line) for line in run.stdout.splitlines()]
    assert [s["stage"] for s in stages][:1] == ["built"] and stages[0]["plugins"] == 18
    if gpu_missing():
        assert run.returncode == 1 and "No NVIDIA driver" in run.stderr
