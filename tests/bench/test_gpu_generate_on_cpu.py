"""gpu_generate.py and gpu_profile.py without a GPU: the CPU backend, the CPU provider on the stand-in for CUDA."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import gpu  # puts the benchmarks on the path
import gpu_bundle
import gpu_generate
import gpu_outcome
import gpu_profile
import pytest
import torch
from cuda_stubs.prepare import Unavailable, prepare
from device_helpers import HostExecutor, host_backend
from fake_cudart import HostDevice
from safetensors import safe_open

from dmoe_export.checkpoint.family import Checkpoint
from dmoe_export.checkpoint.synthetic import GEOMETRIES, write_synthetic
from dmoe_export.errors import MissingRequirementError
from dmoe_export.runtime.gpu.backend import DeviceBackend
from dmoe_export.runtime.gpu.memory import Pool
from dmoe_export.runtime.gpu.onnxruntime import OnnxRuntimeExecutor

OPTIONS = argparse.Namespace(geometry="tiny", layers=2, precision="fp16", prompt=32, blocks=2, steps=4, profile=0,
                             cpu=False, salient=0)
RESULT = {"benchmark": "gpu_generate", "date": "2030-01-01T00:00", "device": {"name": "NVIDIA H100"}}


def tensors(folder):
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return found


def test_quick_checkpoints_are_like_the_others(tmp_path):
    config = GEOMETRIES["tiny"]
    write_synthetic(tmp_path / "slow", config, dtype=torch.float16, merged=True)
    gpu_bundle.write_checkpoint(tmp_path / "quick", config, torch.float16)
    slow, quick = tensors(tmp_path / "slow"), tensors(tmp_path / "quick")
    assert {name: (x.shape, x.dtype) for name, x in quick.items()} == {n: (x.shape, x.dtype) for n, x in slow.items()}
    assert Checkpoint(tmp_path / "quick").description == Checkpoint(tmp_path / "slow").description
    for name, values in quick.items():
        wanted = slow[name].float()
        assert values.float().std().item() == pytest.approx(wanted.std().item(), rel=0.3, abs=1e-6), name
        assert (values == 1).all() == (wanted == 1).all()


def test_bundles_are_used_again(tmp_path, monkeypatch, tiny_bundle):
    (tmp_path / "tiny-2-fp16.bundle").symlink_to(tiny_bundle.folder)
    monkeypatch.setattr(gpu_bundle, "write_checkpoint", None)
    bundle, made = gpu_bundle.random_bundle(tmp_path, "tiny", 2, "fp16")
    assert bundle.manifest == tiny_bundle.manifest and made == {"reused": True}


@pytest.fixture
def measured(monkeypatch, tmp_path, tiny_bundle):
    """`measured(backends)`: entries, and the result's file."""

    def measured(every):
        monkeypatch.setattr(gpu_generate, "random_bundle", lambda *_: (tiny_bundle, {"reused": True}))
        monkeypatch.setattr(gpu_generate, "backends", lambda *_: iter(every))
        result = {**RESULT, "runs": []}
        entries = []
        gpu_generate.run(tmp_path, OPTIONS, None,
                         lambda entry: (entries.append(entry), gpu_generate.add_entry(result, tmp_path, entry)))
        assert json.loads((tmp_path / "gpu_generate_h100_2030-01-01.json").read_text()) == result
        return entries, result

    return measured


def test_salient_steps_have_an_entry_of_their_own(salient_block, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_generate, "random_bundle", lambda *_: (salient_block, {"reused": True}))
    name = "onnxruntime-cuda ops, CUDA graphs"
    monkeypatch.setattr(gpu_generate, "backends", lambda *_: iter([
        (name, lambda: host_backend(salient_block, cuda_graphs=True))]))
    result, options = {**RESULT, "runs": []}, argparse.Namespace(**{**vars(OPTIONS), "salient": 16})
    gpu_generate.run(tmp_path, options, None, lambda entry: gpu_generate.add_entry(result, tmp_path, entry))
    *_, last = result["runs"]
    assert [e["backend"] for e in result["runs"]] == [name, name, f"{name}, salient 16"] and last["denoise_ms"] > 0
    figures = last["salient"]
    assert figures["steps"] + figures["overflows"] > 0 and figures["graphs"].keys() >= {"fill"}
    assert all(g["off"] == "" for g in figures["graphs"].values()) and "salient {" in gpu_generate.line(last)


def test_every_backend_has_its_entries(measured, tiny_bundle, monkeypatch, capsys):
    def absent():
        raise MissingRequirementError("There is none.")

    def broken():
        raise ValueError("what nobody thought of")

    entries, result = measured([
        ("onnxruntime-cuda ops, CUDA graphs", lambda: host_backend(tiny_bundle, cuda_graphs=True)),
        ("onnxruntime-cuda ops", absent), ("tensorrt", "TensorRT cannot build for it.")])
    assert [(e["backend"], e["coreset"]) for e in entries] == [
        ("onnxruntime-cuda ops, CUDA graphs", "15"), ("onnxruntime-cuda ops, CUDA graphs", "all"),
        ("onnxruntime-cuda ops", "any"), ("tensorrt", "any")]
    first, both, none, tensorrt = entries
    assert first["placement"] == {"CPUExecutionProvider": first["placement"]["CPUExecutionProvider"]}
    assert first["graphs"]["replayed"] > 0 and first["graphs"]["off"] == "" and first["forwards"]["denoise"] == 6
    assert first["forwards"]["prefill+denoise"] == first["forwards"]["commit+denoise"] == 1
    assert first["model_forwards"] == 10 and "commit+denoise " in gpu_generate.line(first)
    assert first["unique_experts"] <= 15 and both["settings"]["min_experts"] == 16 and first["denoise_ms"] > 0
    assert none["missing"] == "There is none." and tensorrt["missing"] == "TensorRT cannot build for it."
    text = gpu_generate.table(entries)
    assert "a step of all experts takes" in text and "missing: There is none." in text
    assert len(gpu_outcome.generate_table(result)) == 4 + 4
    assert gpu_generate.exit_code(entries) == 0
    monkeypatch.setenv("DMOE_REQUIRE_CUSTOM_OPS", "1")
    assert gpu_generate.exit_code(entries) == 1, "custom ops are required and were missing"
    monkeypatch.delenv("DMOE_REQUIRE_CUSTOM_OPS")
    entries, _ = measured([("onnxruntime-cuda ops", broken)])
    assert gpu_generate.exit_code(entries) == 1 and "broke: ValueError: what nobody" in capsys.readouterr().out


def test_entries_replace_those_of_their_kind(tmp_path):
    result = {**RESULT, "runs": []}
    base = {"geometry": "llada2.0-mini", "layers": 6, "precision": "fp16", "backend": "onnxruntime-cuda ops"}
    ran = {"unique_experts": 15.0, "placement": {}, "graphs": None}
    for entry in ({**base, "coreset": "any", "missing": "x"}, {**base, "coreset": "15", "denoise_ms": 3.0, **ran},
                  {**base, "coreset": "15", "denoise_ms": 2.0, **ran},
                  {**base, "precision": "int8", "coreset": "15", "denoise_ms": 1.0, **ran}):
        gpu_generate.add_entry(result, tmp_path, entry)
    fp16, int8 = result["runs"]
    assert fp16["denoise_ms"] == 2.0 and "predicted" not in int8 and "placement_on_stubs" not in int8
    nodes = fp16["placement_on_stubs"]
    assert f"(on stubs {nodes})" in gpu_generate.line(fp16)
    assert "(as on stubs)" in gpu_generate.line({**fp16, "placement": nodes})
    low, high = fp16["predicted"]  # 1.8 … 2.3 ms of 20 layers, of which the head stays
    assert low == pytest.approx(0.215 + 1.585 * 0.3) and high == pytest.approx(0.215 + 2.085 * 0.3)
    assert fp16["over_predicted"] == pytest.approx(2.0 / ((low + high) / 2))


def test_every_kind_of_entry_has_a_row_of_the_outcome():
    """What device_run.sh prints last must not end at an entry without a time."""
    base = {"geometry": "llada2.0-mini", "layers": 6, "precision": "fp16", "coreset": "15", "backend": "b"}
    kinds = ({"missing": "There is none."}, {"broke": "ValueError: no"}, {"profile": {"nodes_us": 321.4}},
             {"denoise_ms": 2.5})
    rows = gpu_outcome.generate_table({**RESULT, "runs": [{**base, **kind} for kind in kinds]})[-len(kinds):]
    for row, said in zip(rows, ("There is none.", "ValueError: no", "321 us of nodes", "2.5"), strict=True):
        assert said in row and row.count("|") == 6


def test_tensorrt_is_not_built_where_it_cannot_run(tiny_bundle, monkeypatch):
    from dmoe_export.engine import build

    monkeypatch.setattr(build, "plan_build", None)
    device = argparse.Namespace(target="sm90")
    *_, (name, why) = gpu_generate.backends(tiny_bundle, device, 100)
    assert name == "tensorrt" and ("sm90" in why or "not installed" in why)
    monkeypatch.setattr(gpu_generate, "build", lambda *_: {}["what nobody thought of"])
    *_, (name, again) = gpu_generate.backends(tiny_bundle, device, 100)
    with pytest.raises(KeyError, match="nobody"):
        again()


class Profiled(HostExecutor):
    """With a profile, on the CPU provider."""

    def __init__(self, bundle, device, profile):
        OnnxRuntimeExecutor.__init__(self, bundle, device, "CPUExecutionProvider", profile=profile)
        self._fake, self._recordable, self.sizes = device.fake, False, []


def test_a_profile_is_summed_up(tiny_bundle, tmp_path):
    device = HostDevice()
    pool, stream = Pool(device), device.stream()
    executor = Profiled(tiny_bundle, device, tmp_path / "p")
    backend = DeviceBackend("host", tiny_bundle, device, pool, stream, executor, None, False)
    settings = gpu_generate.coreset_settings(tiny_bundle, "15")
    found = gpu_profile.profile(tiny_bundle, backend, 3, settings)
    assert found["steps"] == 3 and 0 < len(found["rows"]) <= gpu_profile.ROWS and not list(tmp_path.iterdir())
    assert found["rows"] == sorted(found["rows"], key=lambda row: -row["us"])
    assert 0 < found["nodes_us"] <= found["run_us"] and found["nodes"] > 50
    assert {row["provider"] for row in found["rows"]} == {"CPU"} and "calls" in gpu_profile.table(found)


def test_a_profile_with_other_runs_is_refused():
    events = [{"name": "model_run", "ts": 0, "dur": 5}]
    with pytest.raises(ValueError, match="1 runs where 2"):
        gpu_profile.denoise_windows(events, [True, False], 1)


def test_the_cpu_tries_the_program(monkeypatch, tmp_path, tiny_bundle, capsys):
    monkeypatch.setattr(gpu_generate, "random_bundle", lambda *_: (tiny_bundle, {"reused": True}))
    monkeypatch.setattr(sys, "argv", ["gpu_generate.py", "--cpu", "--geometry", "tiny", "--layers", "2", "--blocks",
                                      "1", "--steps", "2", "--out", str(tmp_path)])
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            gpu_generate.main()
        assert ended.value.code == 0
    (path,) = tmp_path.glob("gpu_generate_cpu-*.json")
    result = json.loads(path.read_text())
    assert len(result["runs"]) == 2 and len(result["commands"]) == 2
    assert "milliseconds per forward" in capsys.readouterr().out


def test_on_the_real_provider_over_stubs(half_sample_bundle, tmp_path):
    """All ways of ONNX Runtime's CUDA provider, and its own profile: as on a GPU, but that kernels do nothing."""
    try:
        environment = prepare(Path(__file__).parents[2] / "build" / "cuda-stubs")
    except Unavailable as error:
        pytest.skip(str(error))
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CUDA_")}
    run = subprocess.run([sys.executable, Path(gpu.__file__).with_name("generate_on_stubs.py"),
                          half_sample_bundle.folder, tmp_path], text=True, capture_output=True, check=False,
                         env={**kept, **environment})
    assert run.returncode == 0, run.stderr[-3000:]
    runs = json.loads((tmp_path / "gpu_generate_stubs_2030-01-01.json").read_text())["runs"]
    graphs, _, ops, _, bodies, _, tensorrt = runs
    assert [r["backend"] for r in (graphs, ops, bodies)] == [*gpu_generate.OPS, "onnxruntime-cuda bodies"]
    assert graphs["graphs"]["replayed"] > graphs["graphs"]["recorded"] > 0 and ops["graphs"] is None
    assert graphs["placement"] == ops["placement"] and ops["placement"].keys() == bodies["placement"].keys()
    assert 0 < ops["placement"]["CPUExecutionProvider"] < 40 < ops["placement"]["CUDAExecutionProvider"]
    assert bodies["placement"]["CUDAExecutionProvider"] > ops["placement"]["CUDAExecutionProvider"]
    assert tensorrt["broke"].endswith("no TensorRT on stubs")
    found = json.loads((tmp_path / "found.json").read_text())
    # What runs of a step; some nodes of the placement are the optimiser's to fold when the session is made.
    assert found["steps"] == 3 and 0.8 < found["nodes"] / sum(ops["placement"].values()) <= 1
    assert found["providers_us"].keys() == {"CUDA", "CPU"}  # the rows are the longest alone
    assert sum(found["providers_us"].values()) == pytest.approx(found["nodes_us"])
