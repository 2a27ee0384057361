"""The GPU benchmarks' own code on the emulated kernels and the stand-in for CUDA: it runs, its rates are right."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gpu  # puts the benchmarks on the path
import gpu_common
import gpu_findings
import gpu_head
import gpu_kernels
import gpu_outcome
import gpu_smoke
import kernel_helpers
import numpy as np
import pytest
import torch
from fake_cudart import OK, FakeCudart, HostDevice
from gpu import conftest, expert_checks
from gpu.expert_checks import ExpertCase
from gpu_common import KernelLibrary, RouteAttributesC, gpu_missing
from gpu_findings import LINES, append_finding, write_summary
from gpu_torch_loop import loop, steps_of

from dmoe_export.runtime.gpu.candidates import CandidateKernel

BENCHMARKS = Path(gpu.__file__).parents[2] / "benchmarks"


class TimedFake(FakeCudart):
    """The stand-in, whose clock ticks once per piece of work."""

    def cudaEventCreate(self):
        return self.cudaEventCreateWithFlags(0)

    def cudaEventElapsedTime(self, start, end):
        assert start.stream == end.stream
        return OK, 2.0 * (end.place - start.place)


@pytest.fixture
def device():
    device = HostDevice()
    device.fake = device._cuda = TimedFake(memory=1 << 30)
    yield device
    assert not device.fake.blocks, "memory was not given back"


@pytest.fixture
def library(device, monkeypatch):
    """The emulated kernels, each call when its turn on the stream comes."""
    library = KernelLibrary(Path(kernel_helpers.library()._name))

    def later(call):
        return lambda *a: device.fake.enqueue(a[-1], lambda: call(*a))

    for name in ("route", "experts", "experts_quantised", "head"):
        monkeypatch.setattr(library, name, later(getattr(library, name)))
    return library


class TestSmoke:
    GEOMETRY = (12, 2, 64, 32)

    @pytest.fixture(autouse=True)
    def few_replays(self, monkeypatch):
        monkeypatch.setattr(gpu_kernels, "time_calls", functools.partial(gpu_common.time_calls, replays=1, warm_up=0))
        monkeypatch.setattr(gpu_smoke, "measure_route", lambda *a: {"ms": 0.01})  # emulated, 20 calls take long

    def run(self, device, library, tmp_path, capsys):
        tell = functools.partial(gpu_smoke._tell, tmp_path, 0.0)
        right = gpu_smoke.run(device, library, tell, self.GEOMETRY, active=4, group=32, copy_bytes=1 << 20)
        return right, capsys.readouterr().out.splitlines(), gpu_findings.read_findings(tmp_path)

    def test_everything_is_right(self, device, library, tmp_path, capsys):
        right, lines, found = self.run(device, library, tmp_path, capsys)
        assert right and len(lines) == len(found) == 7 and all(": right" in line for line in lines[2:])
        assert all(found[f"smoke experts {name}"]["error"] > 1e-6 for name in ("fp16", "bf16", "int8", "int4"))
        assert "smoke copy" in found and "TB/s" in lines[1]
        assert "experts int4" in "\n".join(gpu_outcome.smoke_table(found))

    def test_wrong_results_are_told(self, device, library, tmp_path, capsys, monkeypatch):
        """The next expert's weights, an output that nobody writes, other settings than the gate's."""
        part, route = gpu_smoke.Weights._part, library.route
        monkeypatch.setattr(gpu_smoke.Weights, "_part", lambda w, p, r, d, e: part(w, p, r, d, (e + 1) % 12))
        monkeypatch.setattr(library, "route", lambda a, *rest: route(RouteAttributesC(
            a.mode, a.block_length, a.experts_per_token, 1, 1, 0, 1, 2.5), *rest))
        right, lines, found = self.run(device, library, tmp_path, capsys)
        assert not right and all("WRONG" in line for line in lines[2:]) and not found["smoke route"]["right"]
        monkeypatch.setattr(library, "experts", lambda *a: device.fake.enqueue(a[-1], lambda: None))
        result = gpu_smoke.smoke_experts(device, device.stream(), library, self.GEOMETRY, "fp16", 4, 32)
        assert result["error"] == float("inf") and not result["right"]


class TestBenchmarks:
    def test_kernels(self, device, library, monkeypatch, tmp_path, capsys):
        monkeypatch.setattr(gpu_kernels, "GROUP", 32)
        monkeypatch.setattr(gpu_kernels, "ACTIVE", (2, 5, 6, 17))
        monkeypatch.setattr(gpu_kernels, "DMOE", 2)
        monkeypatch.setattr(gpu_kernels, "TOKEN_ROUTING", 6)
        monkeypatch.setattr(gpu_kernels, "TOKENS", (32,))
        monkeypatch.setattr(gpu_kernels, "ROUTE_TOKENS", (32,))
        monkeypatch.setattr(gpu_kernels, "ROUTE_CALLS", 2)
        monkeypatch.setattr(gpu_kernels, "MODES", {"top_p": 1})
        monkeypatch.setattr(gpu_kernels, "HEADS", {"mini": (300, 64)})
        for module in (gpu_kernels, gpu_head):
            monkeypatch.setattr(module, "time_calls", functools.partial(gpu_common.time_calls, replays=2, warm_up=1))
        monkeypatch.setattr(gpu_head, "PLACES", 1)
        monkeypatch.setattr(gpu_kernels, "CANDIDATES", (50,))

        class Later(CandidateKernel):
            def enqueue(self, *a):
                device.fake.enqueue(a[-1], lambda: CandidateKernel.enqueue(self, *a))

        monkeypatch.setattr(gpu_kernels, "CandidateKernel", Later)
        seen, kept = [], {}
        result = gpu_kernels.run(device, library, quick=True, geometries={"mini": (12, 2, 64, 32)},
                                 baseline=lambda *a: seen.append(a) or {"graph_ms": 4.0}, copy_bytes=1 << 20,
                                 many={(2, 2, 64, 32): (100,)}, keep=kept.__setitem__)
        large = result["experts"].pop()
        assert (large["tokens"], large["active"], large["type"]) == (100, 2, "fp16")
        assert large["flops_per_second"] == pytest.approx(6 * 100 * 2 * 64 * 32 / large["ms"] * 1e3)
        assert result["copy"]["bytes_per_second"] == 2 * (1 << 20) / 2e-3
        assert [(r["type"], r["active"]) for r in result["experts"]] == [
            (kind, active) for kind in ("fp16", "bf16", "int8", "int4") for active in (2, 5, 6)], "17 cannot be active"
        first = result["experts"][0]
        assert first["calls_per_replay"] == 6 and first["ms"] == pytest.approx(2 / 6)  # a graph is one piece of work
        values = 2 * 3 * 32 * 64
        assert first["expert_bytes"] == values * 2
        assert [r["expert_bytes"] for r in result["experts"][6::3]] == [values * 17 // 16, values * 9 // 16]
        assert first["bytes_per_second"] == pytest.approx(first["expert_bytes"] / first["ms"] * 1e3)
        assert first["torch_over_ours"] == pytest.approx(4.0 * 6 / 2) and len(seen) == 6
        assert result["dmoe_against_token_routing"][0]["bytes_ratio"] == 3
        assert [(r["type"], r["tokens"]) for r in result["head"]] == [("fp16", 32), ("bf16", 32)]
        assert result["head"][0]["bytes_per_second"] == pytest.approx(2 * 300 * 64 / 2e-3)
        assert "head fp16 V 300 H 64 N  32: 2000.0 us" in gpu_kernels.table(result)
        assert "candidates   50 of V 300 N   1: 500.0 us" in gpu_kernels.table(result)
        assert "L2 warm" not in gpu_kernels.table(result) and "of copy" in gpu_kernels.table(result)
        path = gpu_common.write_result(result, tmp_path)
        monkeypatch.setattr(sys, "argv", ["gpu_outcome.py", str(tmp_path)])
        gpu_outcome.main()
        assert "| experts int4, 5 active |" not in capsys.readouterr().out, "another size than the predicted one"
        assert path.name.startswith("gpu_kernels_host-memory_20") and json.loads(path.read_text()) == result
        assert len(kept) == 17 and kept["kernels experts int4 H64 N32 active 2"] == result["experts"][9]
        lines = gpu_outcome.kernels_table(result)
        assert len([line for line in lines if line.startswith("| route")]) == 1

    def test_the_torch_loop_computes_the_same(self):
        case = ExpertCase("fp16", np.array([[0, 1], [2, 0], [1, 2]]), 3, 16, 8)
        case.weights = np.full((3, 2), np.float32(1.25))
        gate_up, down = (torch.stack([expert_checks.to_tensor(case.stored(e)[i], "fp16") for e in range(3)])
                         for i in range(2))
        got = loop(expert_checks.to_tensor(case.hidden, "fp16").float(), gate_up.float(), down.float(),
                   steps_of(case.ids, 1.25, "cpu"))
        np.testing.assert_allclose(got.numpy(), case.reference, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("script", ["gpu_kernels.py", "gpu_generate.py", "gpu_smoke.py"])
    def test_without_a_gpu_one_sentence_and_exit_code_3(self, script):
        if gpu_missing() is None:
            pytest.skip("this machine has a GPU")
        path = BENCHMARKS / script
        run = subprocess.run([sys.executable, path], text=True, capture_output=True, check=False)
        assert run.returncode == 3 and run.stdout == "" and run.stderr.count("\n") == 1 and "NVIDIA" in run.stderr



class TestPredictions:
    MINI = {"hidden": 2048, "width": 512, "tokens": 32}  # noqa: RUF012

    def test_each_is_found_for_its_gpu_and_sizes(self):
        for row in gpu_outcome.predictions()["experts"]["rows"]:
            for name in row["types"]:
                result = {**self.MINI, "type": name, "active": row["active"]}
                found = gpu_outcome.predicted_experts(f"NVIDIA {row['gpu']} 80GB HBM3", result)
                assert found == (row["low"], row["high"]) and row["limit"] < row["low"]
                assert gpu_outcome.predicted_experts("NVIDIA GH200 480GB", result) is None
                assert gpu_outcome.predicted_experts("NVIDIA H100", {**result, "tokens": 64}) is None
        assert gpu_outcome.predicted_route("NVIDIA H100", 256, 32) == (4.5, 5.5)

    def test_the_page_says_the_same(self):
        page = (BENCHMARKS.parent / "docs" / "gpu.md").read_text()
        for part in ("experts", "step"):
            for row in gpu_outcome.predictions()[part]["rows"]:
                assert f"| {row['low']} … {row['high']} |" in page

    def test_a_ratio_is_of_the_middle(self):
        assert gpu_outcome.against(60, (45, 55)) == {"predicted": [45, 55], "over_predicted": 1.2}
        assert gpu_outcome.said(60, (45, 55), "us") == "predicted 45 … 55, measured 60 us, ratio 1.20"
        assert gpu_outcome.against(60, None) == {} and gpu_outcome.said(60, None, "us") == ""

    def test_a_folder_without_results(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(sys, "argv", ["gpu_outcome.py", str(tmp_path)])
        with pytest.raises(SystemExit) as ended:
            gpu_outcome.main()
        assert ended.value.code == 1 and "has no result" in capsys.readouterr().err


class TestFindings:
    def test_they_add_up_over_processes_and_a_half_line(self, tmp_path):
        code = ("import sys, pathlib, gpu_findings as f\nfor i in range(50):\n    "
                "f.append_finding(pathlib.Path(sys.argv[1]), f'{sys.argv[2]} {i}', ['x' * 3000])")
        workers = [subprocess.Popen([sys.executable, "-c", code, tmp_path, name], env={
            **os.environ, "PYTHONPATH": f"{BENCHMARKS}:{BENCHMARKS.parent}"}) for name in "ab"]
        assert [worker.wait() for worker in workers] == [0, 0]
        append_finding(tmp_path, "device", {"name": "NVIDIA H100 80GB HBM3"})
        append_finding(tmp_path, "a 0", 1)
        with (tmp_path / LINES).open("a") as file:
            file.write('{"name": "cut')
        path = write_summary(tmp_path)
        assert path.name.startswith("gpu_test_h100-80gb-hbm3_") and len(list(tmp_path.iterdir())) == 2
        findings = json.loads(path.read_text())["findings"]
        assert len(findings) == 102 and findings["a 0"] == 1 and findings["lines that cannot be read"] == 1
        assert all(findings[f"{name} {i}"] == ["x" * 3000] for name in "ab" for i in range(1, 50))

    def test_the_command_without_findings(self, tmp_path):
        run = subprocess.run([sys.executable, BENCHMARKS / "gpu_findings.py", tmp_path], text=True, capture_output=True,
                             check=False)
        assert run.returncode == 1 and run.stdout == "" and "has no finding" in run.stderr

    def test_tests_keep_them_at_once(self, tmp_path, monkeypatch):
        monkeypatch.setenv("DMOE_GPU_RESULTS", str(tmp_path))
        monkeypatch.setattr(conftest, "FINDINGS", {})
        conftest.keep("a", {"b": 1})
        assert gpu_findings.read_findings(tmp_path) == {"a": {"b": 1}}
        said = []
        conftest.pytest_terminal_summary(SimpleNamespace(write_sep=lambda *_: None, write_line=said.append))
        assert said[0] == 'a: {"b": 1}' and "gpu_test_unknown" in said[1]
