"""The sample through every GPU backend, forward by forward against the CPU backend; flips are counted and kept."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dmoe_export.bundle.engines import add_engine, engine_file
from dmoe_export.bundle.reader import Bundle, open_bundle
from dmoe_export.engine.build import build_engine, plan_build
from dmoe_export.engine.flavour import find_flavour
from dmoe_export.engine.settings import BuildSettings
from dmoe_export.errors import InputError, MissingRequirementError
from dmoe_export.runtime.cpu.backend import OnnxRuntimeBackend
from dmoe_export.runtime.gpu.onnxruntime import open_onnxruntime_cuda
from dmoe_export.runtime.gpu.tensorrt import open_tensorrt

from . import replay
from .conftest import missing_custom_ops

SAMPLE = Path(__file__).parents[2] / "samples" / "tiny-dmoe"
PROMPTS = 12
# fp32 on a GPU may still multiply in TF32; quantised experts are compared with the same integers on the CPU.
MARGINS = {"fp32": 0.02, "fp16": 0.1, "int8": 0.1, "int4": 0.1}


@pytest.fixture(scope="module", params=list(MARGINS))
def bundle(request, exported) -> Bundle:
    """Shared with the other workers, and not to be changed."""
    dense = {"dense_precision": "fp16"} if request.param.startswith("int") else {}
    return exported(SAMPLE, precision=request.param, compute="fp32" if request.param == "fp32" else "fp16", **dense)


@pytest.fixture(scope="module")
def recorded(bundle) -> replay.Recording:
    """The CPU backend's run, one prompt at a time."""
    return replay.record(OnnxRuntimeBackend(bundle), [[p] for p in replay.sample_prompts(bundle, SAMPLE, PROMPTS)])


@pytest.fixture(scope="module")
def odd(bundle) -> replay.Recording:
    """A batch whose cache grows and whose rows end one after the other."""
    recording = replay.record(OnnxRuntimeBackend(bundle),
                              [replay.odd_batch(replay.sample_prompts(bundle, SAMPLE, 3))], **replay.ODD)
    assert replay.ends(recording) >= 2
    return recording


def _compare(bundle: Bundle, recording: replay.Recording, backend, found, name: str) -> None:
    report = replay.compare(recording, backend)
    found(f"generation {name} {bundle.manifest.export_precision}", report)
    replay.check(report, MARGINS[bundle.manifest.export_precision])


def _opened(bundle: Bundle, device, found, graphs: bool, ops: str):
    """The backend, or a skip that says why not; never a skip where the custom ops are required."""
    if ops == "on" and bundle.manifest.precision == "fp32":
        pytest.skip("the custom ops compute in fp16 and bf16 only")
    if ops == "off" and bundle.manifest.quantisation:
        pytest.skip("quantised experts need the custom ops")
    try:
        return open_onnxruntime_cuda(bundle, device, graphs, ops)
    except MissingRequirementError as error:
        found("onnxruntime-cuda", str(error))
        missing_custom_ops(str(error))


@pytest.mark.parametrize("ops", ["on", "off"])
def test_onnxruntime_cuda(bundle, recorded, device, found, ops):
    backend = _opened(bundle, device, found, False, ops)
    found(f"placement {bundle.manifest.export_precision} ops={ops}", backend.placement)
    _compare(bundle, recorded, backend, found, f"onnxruntime-cuda ops={ops}")


@pytest.mark.parametrize("ops", ["on", "off"])
def test_onnxruntime_cuda_steps_recorded(bundle, recorded, odd, device, found, ops):
    """Steps from CUDA graphs against the same steps without: the kernels are the same, so are the tokens."""
    plain, recorded_steps = (_opened(bundle, device, found, graphs, ops) for graphs in (False, True))
    equal = []
    for recording in (recorded, odd):
        for batch in recording.batches:
            want, got = (replay.decode(b, batch, **recording.changes) for b in (plain, recorded_steps))
            equal.append(got == want)
    graphs = recorded_steps.graphs
    found(f"graphs onnxruntime-cuda {bundle.manifest.export_precision} ops={ops}",
          {"recorded": graphs.recorded, "replayed": graphs.replayed, "off": graphs.off, "equal": equal})
    assert all(equal)
    assert graphs.replayed or graphs.off, "graphs were neither used nor refused"


def test_onnxruntime_cuda_rows_end_apart(bundle, odd, device, found):
    """A batch whose cache grows meanwhile; its steps are recorded, too."""
    backend = _opened(bundle, device, found, True, "off" if bundle.manifest.precision == "fp32" else "on")
    _compare(bundle, odd, backend, found, "batch of 3, onnxruntime-cuda")


@pytest.mark.parametrize("experts_op", ["plugin", "onnx"])
@pytest.mark.parametrize("experts", ["external", "inline"])
def test_tensorrt(bundle, recorded, device, library, found, tmp_path, experts, experts_op):
    """The plugin through an engine of the sample, with and without CUDA graphs."""
    if bundle.manifest.precision == "fp32" and experts_op == "plugin":
        pytest.skip("the experts plugin computes in fp16 and bf16 only")
    if bundle.manifest.quantisation and experts_op == "onnx":
        pytest.skip("quantised experts need the plugin")
    try:
        flavour = find_flavour()
        flavour.targets((device.target,))
    except (MissingRequirementError, InputError) as error:
        found("tensorrt", str(error))
        pytest.skip(f"{error} (see test_rtx_engines_of_other_targets)")
    folder = tmp_path / "bundle"
    shutil.copytree(bundle.folder, folder)
    settings = BuildSettings(targets=(device.target,), max_context=256, max_prefill=64, experts=experts,  # type: ignore[arg-type]
                             experts_op=experts_op)  # type: ignore[arg-type]
    plan = plan_build(open_bundle(folder), settings, flavour)
    with engine_file(folder, plan.file_name) as path:
        add_engine(folder, path, build_engine(plan, path))
    built = open_bundle(folder)
    for graphs in (False, True):
        backend = open_tensorrt(built, device, graphs)
        _compare(built, recorded, backend, found,
                 f"{flavour.name} {flavour.version} {experts} {experts_op} graphs={graphs}")
        if graphs:
            found(f"graphs {flavour.name} {experts_op}", {"replayed": backend.graphs.replayed,
                                                          "off": backend.graphs.off})
            assert backend.graphs.replayed or backend.graphs.off, "graphs were neither used nor refused"
            assert backend.graphs.replayed or experts_op == "onnx", "the plugin's steps must be recordable"


@pytest.mark.parametrize("variant", ["default", "sm80", "sm120", "current"])
def test_rtx_engines_of_other_targets(bundle, found, library, variant):
    """A finding, not a demand: how far such an engine comes on this GPU. Wrong results would be an error."""
    if bundle.manifest.export_precision != "fp16":
        pytest.skip("asked once, with fp16")
    try:
        find_flavour("tensorrt-rtx")
    except MissingRequirementError as error:
        found("tensorrt-rtx", str(error))
        pytest.skip(str(error))
    # A process of its own: some failures of the library end the process.
    script = Path(__file__).parent / "rtx_finding.py"
    run = subprocess.run([sys.executable, str(script), str(bundle.folder), variant], text=True, capture_output=True,
                         timeout=300, check=False)
    stages = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    last = run.stderr.strip().splitlines()[-1:]
    found(f"rtx engine for {variant}", {"exit": run.returncode, "stages": stages, "said": last})
    reached = [stage["stage"] for stage in stages]
    assert "ran" not in reached or "right" in reached, f"it runs here, and wrongly: {last}"
