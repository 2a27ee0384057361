"""The GPU checks and the benchmark of experts in slots, run on the emulated kernels and the stand-in for CUDA."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import gpu  # puts the benchmarks on the path
import gpu_common
import gpu_residency
import kernel_helpers
import numpy as np
import pytest
from fake_cudart import HostDevice
from gpu.expert_checks import ExpertCase, QuantisedCase, routed_ids
from gpu.residency_checks import ResidentExperts, check_residency
from gpu.spaces import emulated_space
from gpu_common import KernelLibrary, gpu_missing
from test_gpu_benchmarks import TimedFake


@pytest.fixture(scope="module")
def space():
    return emulated_space(HostDevice(), Path(kernel_helpers.library()._name))


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_the_checks_run_and_pass(space, kind):
    check_residency(space, ExpertCase(kind, routed_ids(19, 3, 12, 9, empty=0.1), 12, 72, 24), slots=5)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_checks_of_integers_run_and_pass(space, bits):
    case = QuantisedCase("fp16", routed_ids(19, 3, 12, 9, empty=0.1), 12, 128, 64, bits=bits, group=32)
    check_residency(space, case, slots=5)


def test_the_checks_can_fail(space):
    """A slot with another expert's weights."""
    case = ExpertCase("fp16", np.zeros((4, 1), int), 3, 16, 8)
    resident = ResidentExperts(space, case, 2)
    resident.show({0: 1})
    assert (resident.run() == resident.want).all()
    resident.show({1: 1})
    resident._table.put(np.int32([1, -1, -1]), space.stream)
    assert (resident.run() != resident.want).any()


def test_the_benchmark_runs(monkeypatch):
    device = HostDevice()
    device.fake = device._cuda = TimedFake()
    library = KernelLibrary(Path(kernel_helpers.library()._name))
    call = library.experts_resident
    monkeypatch.setattr(library, "experts_resident", lambda *a: device.fake.enqueue(a[-1], lambda: call(*a)))
    monkeypatch.setattr(gpu_residency, "time_calls", functools.partial(gpu_common.time_calls, replays=2, warm_up=1))
    kept = {}
    result = gpu_residency.run(device, library, (8, 2, 64, 16), 6, 4, (0, 1, 4), kept.__setitem__)
    assert [*kept] == ["residency pinning", *(f"residency {n} misses" for n in (0, 1, 4))]
    assert result["pinning"] == kept["residency pinning"] and result["pinning"]["bytes"] == 8 * 3 * 64 * 16 * 2
    assert "pinning 0.00 GB" in gpu_residency.table(result)
    assert [r["misses"] for r in result["resident"]] == [0, 1, 4]
    assert result["resident"][2]["miss_bytes"] == 4 * 3 * 64 * 16 * 2 and result["ms_per_copy"] > 0
    assert result["cpu"]["ms"] > 0 and "computed on the CPU" in gpu_residency.table(result)
    assert not device.fake.blocks, "memory was not given back"


def test_without_a_gpu_one_sentence_and_exit_code_3():
    if gpu_missing() is None:
        pytest.skip("this machine has a GPU")
    path = Path(gpu.__file__).parents[2] / "benchmarks" / "gpu_residency.py"
    run = subprocess.run([sys.executable, path], text=True, capture_output=True, check=False)
    assert run.returncode == 3 and run.stdout == "" and run.stderr.count("\n") == 1 and "NVIDIA" in run.stderr
