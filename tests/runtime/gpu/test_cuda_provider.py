"""ONNX Runtime's real CUDA provider with our custom ops, without a GPU: on stubs of CUDA's libraries (cuda_stubs/).

Kernels do nothing there, so nothing is said of results. What is real: which nodes the provider takes, what it asks of
the device in a step, which calls the host makes, and whether a step could be recorded under CUDA's rules.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu  # noqa: F401 - puts the benchmarks on the path
import pytest
from cuda_stubs.prepare import Unavailable, pinned_version, prepare
from linked_layouts import hub
from slim_onnxruntime import UNREACHED

from dmoe_export.bundle.reader import open_bundle
from dmoe_export.runtime.gpu.nvidia_libraries import nvidia_folders
from dmoe_export.runtime.gpu.onnxruntime import SHAPE_OPS

HERE = Path(__file__).parents[2]
CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
# What the sample's graph has the CPU compute: sizes for Reshape and Concat, whatever the number of layers.
SHAPE_ARITHMETIC = {"custom ops": {"Concat": 1}, "bodies": {"Concat": 12, "Squeeze": 2, "Div": 1}}
STEP = 60  # operations of a step of the sample (4 layers) with our custom ops; fewer are better
REPLAYED = {"cudaMemcpyAsync": 2, "cudaGraphLaunch": 1, "cudaStreamSynchronize": 1}


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    try:
        made = prepare(HERE.parent / "build" / "cuda-stubs")
    except Unavailable as error:
        pytest.skip(str(error))
    return {**{name: value for name, value in os.environ.items() if not name.startswith("CUDA_")}, **made}


@pytest.fixture(scope="module")
def driven(environment, run_folder) -> Callable[..., dict[str, Any]]:
    """What drive.py found out about a bundle."""
    def drive(bundle: Any, *options: str) -> dict[str, Any]:
        out = run_folder / f"{bundle.folder.name}.cuda.json"
        run = subprocess.run([sys.executable, HERE / "cuda_stubs" / "drive.py", bundle.folder, "--out", out, *options],
                             capture_output=True, text=True, env=environment, check=False)
        assert run.returncode == 0 and "onnxruntime" not in run.stderr, run.stderr[-3000:]
        return json.loads(out.read_text())

    return drive


@pytest.fixture(scope="module")
def sample(driven, half_sample_bundle) -> dict[str, Any]:
    return driven(half_sample_bundle)


def test_the_stubs_know_cuda_s_rules(sample):
    assert sample["onnxruntime"] == pinned_version()
    wait, host, other, fine = (sample["rules"][name] for name in ("wait", "host copy", "other stream", "device copy"))
    assert "failed due to a previous error during capture" in wait and "on another stream than the one" in other
    assert "would copy from the host's memory 1 times" in host and fine == ""


@pytest.mark.parametrize("way", ["custom ops", "bodies"])
def test_only_shape_arithmetic_is_on_the_cpu(sample, way):
    run = sample["runs"][way]
    assert run["cpu_ops"] == SHAPE_ARITHMETIC[way] and run["cpu_ops"].keys() <= SHAPE_OPS
    assert run["placement"].keys() == {CUDA, CPU} and run["placement"][CPU] == sum(SHAPE_ARITHMETIC[way].values())


def test_no_kernel_is_launched_that_a_gpu_machine_is_not_sent(sample):
    """Names are read, so those of our ops and of the provider are there."""
    kernels = [{kernel.encode() for kernel in sample["runs"][way]["kernels"]} for way in ("custom ops", "bodies")]
    assert any(b"dmoe" in kernel for kernel in kernels[0]) and any(b"onnxruntime" in kernel for kernel in kernels[1])
    assert not [kernel for kernel in kernels[0] | kernels[1] if UNREACHED.search(kernel)]


def test_custom_ops_save_operations(sample):
    ours, bodies = (sample["runs"][way]["step"]["operations"] for way in ("custom ops", "bodies"))
    assert ours <= STEP < bodies


def test_a_step_waits_once_and_copies_what_it_must(sample):
    """In: ids, positions, settings. Out: tokens, confidences, experts. Nothing else goes between host and device."""
    for way in ("custom ops", "bodies"):
        calls = sample["runs"][way]["step"]["calls"]
        assert calls["cudaStreamSynchronize"] == 1 and "cudaEventSynchronize" not in calls
        assert "cudaMalloc" not in calls and "cudaHostAlloc" not in calls


def test_a_recorded_step_is_four_calls(sample):
    plain, recorded = sample["runs"]["custom ops"], sample["runs"]["custom ops, recorded"]
    assert recorded["graphs"]["off"] == "" and recorded["graphs"]["replayed"] > 3 * recorded["graphs"]["recorded"] > 0
    assert recorded["replayed_step"]["calls"] == REPLAYED
    same = ("launches", "copies", "sets", "library_calls", "host_functions")
    assert [recorded["replayed_step"][kind] for kind in same] == [plain["step"][kind] for kind in same]


def test_drawing_adds_two_launches_and_two_small_copies(sample):
    """Behind the recorded step, which is the greedy one; logits stay on the device, but the mask token's."""
    greedy, drawing = sample["runs"]["custom ops, recorded"]["replayed_step"], sample["drawing"]["replayed_step"]
    assert sample["drawing"]["violations"] == []
    assert [drawing[kind] - greedy[kind] for kind in ("launches", "copies", "sets", "library_calls")] == [2, 2, 0, 0]
    launches = {name: count for name, count in drawing["calls"].items() if name.startswith("cudaLaunch")}
    assert sum(launches.values()) == 2
    assert {**drawing["calls"], "cudaMemcpyAsync": 2} == REPLAYED | launches | {"cudaMemcpy3DAsync": 1}


def test_a_batch_with_a_growing_cache(sample):
    batch = sample["batch"]
    assert batch["tokens"] == [160] * 3 and batch["replayed_step"]["calls"] == REPLAYED
    assert len({past for _, _, past in batch["shapes"]}) >= 3, "the cache should have grown over buckets"


def test_nothing_that_cuda_forbids(sample):
    for run in (*sample["runs"].values(), sample["batch"]):
        assert run["violations"] == []


def test_a_bundle_of_links_is_opened_too(driven, half_sample_bundle, tmp_path):
    """As in a hub's cache; with our custom ops and without."""
    run = driven(open_bundle(hub(half_sample_bundle.folder, tmp_path), "sizes"))["runs"]
    assert all(run[way]["placement"].keys() == {CUDA, CPU} for way in ("custom ops", "bodies"))


@pytest.mark.parametrize("family", ["llada_dense", "dream", "llada_moe"])
def test_other_families_are_recorded_too(driven, golden, exported, family):
    """Biases and shifted logits (Dream), whole canvases, experts without groups; exports of test_golden_families.py."""
    found = driven(exported(golden.parent / family / "model", precision="fp16", compute="fp16"), "--no-bodies")
    for run in (*found["runs"].values(), found["batch"]):
        assert run["cpu_ops"].keys() <= SHAPE_OPS and run["violations"] == []
    assert found["runs"]["custom ops, recorded"]["graphs"]["off"] == ""
    assert found["batch"]["replayed_step"]["calls"] == REPLAYED


@pytest.mark.slow
def test_salient_steps_are_recorded_too(driven, salient_half_sample):
    """TopK and scattering on the provider; the experts lie on the device once, for three sessions."""
    found = driven(salient_half_sample, "--salient", "8")
    assert found["violations"] == [] and found["graphs"].keys() == {"8", "fill"}
    for graph in found["graphs"].values():
        assert graph["placement"].keys() == {CUDA, CPU} and graph["cpu_ops"].keys() <= SHAPE_OPS
        assert graph["off"] == "" and graph["recorded"] > 0
    sparse = found["graphs"]["8"]
    assert sparse["replayed"] > sparse["recorded"] and sparse["replayed_step"]["calls"] == REPLAYED
    assert sparse["step"]["calls"]["cudaStreamSynchronize"] == 1
    opened, after = found["bytes_used"]
    experts = (salient_half_sample.folder / salient_half_sample.manifest.experts.file).stat().st_size
    assert opened > experts and after - opened < 2 * experts, "each session holds experts of its own"


def test_libraries_of_nvidia_s_packages_are_found(tmp_path, monkeypatch):
    """The run above finds its libraries so, in packages nvidia.* that are not beside ONNX Runtime's."""
    for folder, file in (("cu13", "libcublas.so.13"), ("cudnn", "libcudnn.so.9"), ("nccl", "libnccl.so.2")):
        (tmp_path / "nvidia" / folder / "lib").mkdir(parents=True)
        (tmp_path / "nvidia" / folder / "lib" / file).touch()
    monkeypatch.syspath_prepend(tmp_path)
    ours = [folder.parent.name for folder in nvidia_folders() if tmp_path in folder.parents]
    assert ours == ["cu13", "cudnn"]


def test_quantised_experts(driven, tiny_checkpoint, exported):
    """Their tensors are ours, in memory that the provider takes as it is; the library takes the nodes with them."""
    found = driven(exported(tiny_checkpoint, precision="int4", dense_precision="fp16", compute="fp16", group_size=32),
                   "--no-bodies")
    for run in (*found["runs"].values(), found["batch"]):
        assert run["cpu_ops"].keys() <= SHAPE_OPS and run["violations"] == []
    assert found["batch"]["replayed_step"]["calls"] == REPLAYED
