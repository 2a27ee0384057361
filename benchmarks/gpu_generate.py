"""Time of a denoise step through every backend of this GPU, at LLaDA2.0-mini's size: dMoE against token routing.

    python benchmarks/gpu_generate.py [--layers 4] [--work FOLDER] [--out FOLDER]

Weights are random and made here, so text and coresets mean nothing: `top_p` routing runs with p = 0 and a guard of 15,
which gives coresets of exactly 15 experts (a block of dMoE-16B has 14.6), and token routing spreads over more experts
than a trained model's; the unique experts of every run are in the result. Writes gpu_generate_<device>_<date>.json.
Without a GPU: one sentence, exit code 3 (`--cpu` runs the CPU backend instead, to try the program).
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gpu_common import LIBRARY, RESULTS, KernelLibrary, describe_device, describe_run, require_gpu, write_result

ROUTINGS: dict[str, dict[str, Any]] = {"top_p": {"coreset_top_p": 0.0, "min_experts": 15}, "token": {}}


def write_bundle(folder: Path, geometry: str, layers: int, routing: Any, precision: Any) -> Any:
    """A bundle of random weights; the checkpoint is made once per folder."""
    import torch

    from dmoe_export import export_checkpoint
    from dmoe_export.checkpoint.synthetic import GEOMETRIES, write_synthetic

    checkpoint = folder / f"{geometry}-{layers}"
    if not (checkpoint / "config.json").exists():
        config = GEOMETRIES[geometry] | {"num_hidden_layers": layers}
        write_synthetic(checkpoint, config, dtype=torch.float16 if precision == "fp16" else torch.float32, merged=True)
    return export_checkpoint(checkpoint, folder / f"{geometry}-{layers}-{routing}.bundle", routing=routing,
                             precision=precision, overwrite=True)


def backends(bundle: Any, device: Any, context: int) -> Iterator[tuple[str, Callable[[], Any] | str]]:
    """Name and opener of each backend, or the sentence why there is none."""
    from dmoe_export.runtime.onnxruntime_cuda import open_onnxruntime_cuda
    from dmoe_export.runtime.tensorrt import open_tensorrt

    yield "onnxruntime-cuda", lambda: open_onnxruntime_cuda(bundle, device)
    try:
        built = build(bundle, device.target, context)
    except Exception as error:  # whatever the reason, the other backends are still measured
        yield "tensorrt", f"{type(error).__name__}: {error}"
        return
    yield "tensorrt, CUDA graphs", lambda: open_tensorrt(built, device, True)
    yield "tensorrt, no graphs", lambda: open_tensorrt(built, device, False)


def build(bundle: Any, target: str, context: int) -> Any:
    """The bundle with an engine for this GPU."""
    from dmoe_export.bundle.engines import add_engine, engine_file
    from dmoe_export.bundle.reader import open_bundle
    from dmoe_export.engine.build import build_engine, plan_build
    from dmoe_export.engine.flavour import find_flavour
    from dmoe_export.engine.settings import BuildSettings

    plan = plan_build(bundle, BuildSettings(targets=(target,), max_context=context), find_flavour())
    with engine_file(bundle.folder, plan.file_name) as path:
        add_engine(bundle.folder, path, build_engine(plan, path))
    return open_bundle(bundle.folder, "sizes")


def measure(bundle: Any, open_one: Callable[[], Any], prompt_tokens: int, blocks: int, steps: int,
            settings: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of prefill, denoise and commit forwards, as the loop sees them: copies and waiting included."""
    from dmoe_export.generator import Generator

    start = time.perf_counter()
    backend = open_one()
    opened = time.perf_counter() - start
    generator = Generator(bundle, backend)
    n = backend.routing.block_length
    prompt = [5 + i % 80 for i in range(prompt_tokens)]
    # Fixed acceptance of one place in n / steps per step: every block takes all its steps, in every backend.
    options = {"max_new_tokens": blocks * n, "acceptance": "fixed", "steps": steps, "eos_id": -1, "early_stop": False}
    generator.generate([prompt], **options, **settings)  # warms up: shapes, graphs, kernels
    stats = generator.generate([prompt], **options, **settings)[0].stats
    forwards, seconds = stats.forwards_by_phase, stats.seconds_by_phase
    result = {"open_seconds": opened, "forwards": dict(forwards), "unique_experts": stats.unique_experts,
              "expert_bytes_touched": stats.expert_bytes_touched,
              **{f"{phase}_ms": 1e3 * seconds[phase] / count for phase, count in forwards.items() if count}}
    graphs = getattr(backend, "graphs", None)
    if graphs is not None:
        result["graphs"] = {"recorded": graphs.recorded, "replayed": graphs.replayed, "off": graphs.off}
    return result


def run(result: dict[str, Any], work: Path, options: argparse.Namespace, device: Any) -> None:
    """Fill `result["runs"]`, one entry per routing and backend."""
    from dmoe_export.errors import DmoeError
    from dmoe_export.runtime.onnxruntime import OnnxRuntimeBackend

    for routing, settings in ROUTINGS.items():
        start = time.perf_counter()
        bundle = write_bundle(work, options.geometry, options.layers, routing, options.precision)
        exported = time.perf_counter() - start
        guard = min(settings.get("min_experts", 0), bundle.manifest.model.moe.num_experts)
        used = {**settings, "min_experts": guard} if settings else {}
        context = options.prompt + (options.blocks + 1) * bundle.manifest.routing.block_length
        every: Any = backends(bundle, device, context)
        if options.cpu:
            every = [("onnxruntime", lambda bundle=bundle: OnnxRuntimeBackend(bundle))]
        for name, open_one in every:
            entry = {"routing": routing, "settings": used, "backend": name, "export_seconds": exported}
            try:
                if isinstance(open_one, str):
                    raise RuntimeError(open_one)
                entry |= measure(bundle, open_one, options.prompt, options.blocks, options.steps, used)
            except (DmoeError, RuntimeError) as error:
                entry["missing"] = str(error)
            result["runs"].append(entry)


def table(result: dict[str, Any]) -> str:
    """What to read first."""
    lines = [f"{result['device']['name']}, {result['geometry']} with {result['layers']} layers, {result['precision']}: "
             "milliseconds per forward"]
    for r in result["runs"]:
        if "missing" in r:
            lines.append(f"{r['routing']:>6} {r['backend']:<22} {r['missing']}")
        else:
            lines.append(f"{r['routing']:>6} {r['backend']:<22} denoise {r['denoise_ms']:8.2f}  commit "
                         f"{r.get('commit_ms', float('nan')):8.2f}  prefill {r.get('prefill_ms', float('nan')):8.2f}  "
                         f"{r['unique_experts']:6.1f} experts")
    return "\n".join(lines)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", default="llada2.0-mini")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--precision", choices=["fp16", "fp32"], default="fp16")
    parser.add_argument("--prompt", type=int, default=128, help="prompt tokens [128]")
    parser.add_argument("--blocks", type=int, default=3, help="blocks to generate [3]")
    parser.add_argument("--steps", type=int, default=16, help="denoise steps per block [16]")
    parser.add_argument("--work", type=Path, help="scratch folder, needs three times the model [a temporary one]")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON [benchmarks/results]")
    parser.add_argument("--cpu", action="store_true", help="the CPU backend only")
    options = parser.parse_args()
    device: Any = None
    if options.cpu:
        about = {"name": f"CPU {platform.machine()}"}
    else:
        require_gpu()
        from dmoe_export.runtime.device import CudaDevice

        device = CudaDevice.open()
        about = describe_device(device)
    result = describe_run("gpu_generate", about, KernelLibrary(LIBRARY) if LIBRARY.is_file() else None)
    result |= {"geometry": options.geometry, "layers": options.layers, "precision": options.precision,
               "prompt_tokens": options.prompt, "blocks": options.blocks, "steps": options.steps, "runs": []}
    with contextlib.nullcontext(options.work) if options.work else tempfile.TemporaryDirectory() as work:
        Path(work).mkdir(parents=True, exist_ok=True)
        run(result, Path(work), options, device)
    path = write_result(result, options.out)
    print(f"{path}\n{table(result)}")
    if all("missing" in entry for entry in result["runs"]):
        raise SystemExit("No backend could be measured.")


if __name__ == "__main__":
    main()
