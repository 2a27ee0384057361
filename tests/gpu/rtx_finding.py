"""Does an engine of TensorRT-RTX run on this GPU, for whatever targets it was built? Finds out, one stage at a time.

    python tests/gpu/rtx_finding.py FP16_BUNDLE VARIANT [--build-only]

VARIANT: a target such as sm80; `default` (no target named: NVIDIA says Ampere and later); `current` (this GPU). Prints
a JSON object per stage, so that a stage that ends the process is known too. TensorRT-RTX names no sm90 target: what
happens on Hopper is a question to the machine.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    _ROOT = Path(__file__).resolve().parents[2]
    sys.path[:0] = [str(_ROOT), str(_ROOT / "tests"), str(_ROOT / "tests" / "helpers"), str(_ROOT / "benchmarks")]

from dmoe_export.bundle.engines import add_engine, engine_file
from dmoe_export.bundle.reader import Bundle, open_bundle
from dmoe_export.engine.build import build_engine, plan_build
from dmoe_export.engine.flavour import Flavour, find_flavour
from dmoe_export.engine.settings import BuildSettings

TARGETS = {"default": (), "current": ("CURRENT",)}


class _AnyTarget(Flavour):
    """TensorRT-RTX for targets the product does not offer."""

    def targets(self, wanted: tuple[str, ...]) -> tuple[str, ...]:
        return wanted

    def configure(self, config: Any, targets: tuple[str, ...], flags: tuple[str, ...]) -> None:
        if targets != ("default",):
            super().configure(config, tuple(TARGETS.get(targets[0], targets)), flags)


def tell(stage: str, **what: Any) -> None:
    """One line, at once."""
    print(json.dumps({"stage": stage, **what}), flush=True)


def build(bundle: Bundle, variant: str, flavour: Flavour) -> Bundle:
    """The bundle with an engine of this variant; `variant` is the target in its entry."""
    plan = plan_build(bundle, BuildSettings(targets=(variant,), max_context=256, max_prefill=64),
                      _AnyTarget(flavour.name, flavour.trt))
    with engine_file(bundle.folder, plan.file_name) as path:
        entry = build_engine(plan, path)
        tell("built", bytes=path.stat().st_size, plugins=entry.plugin_nodes, version=entry.version)
        add_engine(bundle.folder, path, entry)
    return open_bundle(bundle.folder, "sizes")


def run(bundle: Bundle, flavour: Flavour, sample: Path) -> None:
    """Deserialise, whatever the entry's targets say, and compare generations with the CPU backend."""
    from dmoe_export.runtime.cpu.backend import OnnxRuntimeBackend
    from dmoe_export.runtime.gpu.backend import DeviceBackend
    from dmoe_export.runtime.gpu.device import CudaDevice
    from dmoe_export.runtime.gpu.memory import Pool
    from dmoe_export.runtime.gpu.tensorrt import TensorRTExecutor
    from gpu.replay import check, compare, record, sample_prompts

    device = CudaDevice.open()
    tell("device", name=device.name, target=device.target)
    pool, stream = Pool(device), device.stream()
    executor = TensorRTExecutor(bundle, bundle.manifest.engines[-1], flavour.trt, pool, stream)
    tell("deserialised")
    recording = record(OnnxRuntimeBackend(bundle), [[prompt] for prompt in sample_prompts(bundle, sample, 4)])

    def no_other(graph: Any) -> Any:
        raise LookupError(graph.file)

    for graphs in (False, True):
        backend = DeviceBackend("tensorrt", bundle, device, pool, stream, executor, no_other, graphs)
        report = compare(recording, backend)
        tell("ran", cuda_graphs=graphs, replayed=backend.graphs.replayed if backend.graphs else 0, **report)
        check(report, 0.1)
    tell("right")


def main() -> None:
    """See the module."""
    bundle, variant, *rest = sys.argv[1:]
    flavour = find_flavour("tensorrt-rtx")
    sample = Path(__file__).resolve().parents[2] / "samples" / "tiny-dmoe"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "bundle"
        shutil.copytree(bundle, folder)
        built = build(open_bundle(folder, "sizes"), variant, flavour)
        if "--build-only" not in rest:
            run(built, flavour, sample)


if __name__ == "__main__":
    main()
