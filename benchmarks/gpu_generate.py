"""Time of a denoise step through every backend of this GPU, at LLaDA2.0-mini's size, beside the prediction.

    python benchmarks/gpu_generate.py [--layers 6] [--precision fp16] [--work FOLDER] [--out FOLDER] [--profile 3]
                                      [--salient 16]

Weights are random and made here, so text and coresets mean nothing: p = 0 and a guard of 15 give coresets of exactly 15
experts (a block of dMoE-16B has 14.6); a guard of all experts lets each token choose as token routing does, which
spreads over more experts than in a trained model. The unique experts of every run are in the result. `--salient`: the
custom ops with CUDA graphs also with salient steps of that capacity (random weights have almost no salient rows, so it
is the least that such a step takes). Every entry is
kept as soon as it is there; runs of a day add up in gpu_generate_<device>_<date>.json. Exit code 1 when a run broke (or
when DMOE_REQUIRE_CUSTOM_OPS=1 and the custom ops were missing). Without a GPU: one sentence, exit code 3 (`--cpu` runs
the CPU backend instead, to try the program).
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from gpu_bundle import random_bundle
from gpu_common import (
    LIBRARY,
    RESULTS,
    KernelLibrary,
    describe_device,
    describe_run,
    require_gpu,
    result_path,
    salient_figures,
    write_result,
)
from gpu_findings import append_finding
from gpu_outcome import against, counted_placement, predicted_step, said

CORESETS = ("15", "all")
KEY = ("geometry", "layers", "precision", "coreset", "backend")  # what one run of a file replaces
OPS = ("onnxruntime-cuda ops, CUDA graphs", "onnxruntime-cuda ops")
Opener = Callable[[], Any]


def coreset_settings(bundle: Any, coreset: str) -> dict[str, Any]:
    """Options of `generate` for so many experts a block, or `all`."""
    experts = bundle.manifest.model.moe.num_experts
    return {"coreset_top_p": 0.0, "min_experts": experts if coreset == "all" else min(int(coreset), experts)}


def settings_of(bundle: Any, name: str, capacity: int) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Backend as it is called in an entry, coreset, and options of `generate`, of each run of a backend."""
    for coreset in CORESETS:
        yield name, coreset, coreset_settings(bundle, coreset)
    if capacity and name == OPS[0]:
        yield f"{name}, salient {capacity}", CORESETS[0], {**coreset_settings(bundle, CORESETS[0]),
                                                           "salient_threshold": 0.99, "salient_capacity": capacity}


def backends(bundle: Any, device: Any, context: int) -> Iterator[tuple[str, Opener | str]]:
    """Name and opener of each backend, what matters most first; or the sentence why there is none."""
    from dmoe_export.errors import DmoeError
    from dmoe_export.runtime.gpu.onnxruntime import open_onnxruntime_cuda
    from dmoe_export.runtime.gpu.tensorrt import open_tensorrt

    yield OPS[0], lambda: open_onnxruntime_cuda(bundle, device, custom_ops="on")
    yield OPS[1], lambda: open_onnxruntime_cuda(bundle, device, cuda_graphs=False, custom_ops="on")
    yield "onnxruntime-cuda bodies", lambda: open_onnxruntime_cuda(bundle, device, cuda_graphs=False, custom_ops="off")
    try:
        built = build(bundle, device.target, context)
    except Exception as error:  # what is not one sentence of ours breaks when the backend is opened
        yield "tensorrt", str(error) if isinstance(error, DmoeError) else partial(_again, error)
        return
    yield "tensorrt, CUDA graphs", lambda: open_tensorrt(built, device, True)
    yield "tensorrt, no graphs", lambda: open_tensorrt(built, device, False)


def _again(error: Exception) -> Any:
    raise error


def build(bundle: Any, target: str, context: int) -> Any:
    """The bundle with an engine for this GPU; raises at once where no TensorRT here can build for it."""
    from dmoe_export.bundle.engines import add_engine, engine_file
    from dmoe_export.bundle.reader import open_bundle
    from dmoe_export.engine.build import build_engine, plan_build
    from dmoe_export.engine.flavour import find_flavour
    from dmoe_export.engine.settings import BuildSettings

    flavour = find_flavour()
    flavour.targets((target,))
    plan = plan_build(bundle, BuildSettings(targets=(target,), max_context=context), flavour)
    with engine_file(bundle.folder, plan.file_name) as path:
        add_engine(bundle.folder, path, build_engine(plan, path))
    return open_bundle(bundle.folder, "sizes")


def measure(bundle: Any, backend: Any, prompt_tokens: int, blocks: int, steps: int,
            settings: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of each kind of forward that ran, as the loop sees them: copies and waiting included.

    `denoise_ms` is a step in which nothing rides, `commit+denoise_ms` one that takes the block before it along.
    """
    from dmoe_export.generator import Generator

    generator = Generator(bundle, backend)
    n = backend.routing.block_length
    prompt = [5 + i % 80 for i in range(prompt_tokens)]
    # Fixed acceptance of one place in n / steps per step: every block takes all its steps, in every backend.
    options = {"max_new_tokens": blocks * n, "acceptance": "fixed", "steps": steps, "eos_id": -1, "early_stop": False}
    graphs = getattr(backend, "graphs", None)
    before = (graphs.recorded, graphs.replayed) if graphs else (0, 0)
    generator.generate([prompt], **options, **settings)  # warms up: shapes, graphs, kernels
    stats = generator.generate([prompt], **options, **settings)[0].stats
    forwards, seconds = stats.executed_by_phase, stats.seconds_by_phase
    return {"forwards": dict(forwards), "model_forwards": stats.forwards, "unique_experts": stats.unique_experts,
            "expert_bytes_touched": stats.expert_bytes_touched,
            "placement": getattr(backend, "placement", {}),
            "graphs": graphs and {"recorded": graphs.recorded - before[0], "replayed": graphs.replayed - before[1],
                                  "off": graphs.off},  # warm-up included
            **salient_figures(backend, stats, settings),
            **{f"{phase}_ms": 1e3 * seconds[phase] / count for phase, count in forwards.items() if count}}


def measure_backend(bundle: Any, open_one: Opener | str, options: argparse.Namespace, about: dict[str, Any],
                    keep: Callable[[dict[str, Any]], None]) -> None:
    """Open one backend and keep an entry for each coreset; `missing`: why there is none, `broke`: what went wrong."""
    from dmoe_export.errors import DmoeError

    try:
        if isinstance(open_one, str):
            return keep({**about, "coreset": "any", "missing": open_one})
        start = time.perf_counter()
        backend = open_one()
        opened = time.perf_counter() - start
    except DmoeError as error:
        return keep({**about, "coreset": "any", "missing": str(error)})
    except Exception as error:  # the other backends are still measured, and the exit code tells
        return keep({**about, "coreset": "any", "broke": f"{type(error).__name__}: {error}"})
    for name, coreset, settings in settings_of(bundle, about["backend"], options.salient):
        entry = {**about, "backend": name, "coreset": coreset, "settings": settings, "open_seconds": opened}
        try:
            entry |= measure(bundle, backend, options.prompt, options.blocks, options.steps, settings)
        except Exception as error:
            entry["broke"] = f"{type(error).__name__}: {error}"
        keep(entry)
    return None


def run(work: Path, options: argparse.Namespace, device: Any, keep: Callable[[dict[str, Any]], None]) -> None:
    """All backends, each closed before the next; then the profile."""
    bundle, made = random_bundle(work, options.geometry, options.layers, options.precision, options.salient)
    print(f"bundle: {json.dumps(made)}", flush=True)
    context = options.prompt + (options.blocks + 1) * bundle.manifest.routing.block_length
    every: Any = backends(bundle, device, context)
    if options.cpu:
        from dmoe_export.runtime.cpu.backend import OnnxRuntimeBackend

        every = [("onnxruntime", lambda: OnnxRuntimeBackend(bundle))]
    about = {"geometry": options.geometry, "layers": options.layers, "precision": options.precision,
             "prompt_tokens": options.prompt, "blocks": options.blocks, "steps": options.steps, "bundle": made}
    for name, open_one in every:
        measure_backend(bundle, open_one, options, {**about, "backend": name}, keep)
        gc.collect()  # its weights leave the device
    if options.profile:
        keep({**about, "backend": "profile", "coreset": "15", **profile(bundle.folder, work, options.profile)})


def profile(bundle: Path, work: Path, steps: int) -> dict[str, Any]:
    """gpu_profile.py's result; a process of its own, in which launches wait."""
    out = work / "profile.json"
    script = Path(__file__).with_name("gpu_profile.py")
    done = subprocess.run([sys.executable, script, bundle, "--steps", str(steps), "--out", out], text=True,
                          capture_output=True, check=False)
    if done.returncode:
        return {"broke": f"gpu_profile.py ended with {done.returncode}: {(done.stderr.splitlines() or [''])[-1]}"}
    print(done.stdout, flush=True)
    return {"profile": json.loads(out.read_text())}


def add_entry(result: dict[str, Any], folder: Path, entry: dict[str, Any]) -> None:
    """Keep an entry at once: in the result and its file, as a finding, and on the screen."""
    if "denoise_ms" in entry:
        entry |= against(entry["denoise_ms"], predicted_step(result["device"]["name"], entry))
        if expected := counted_placement(entry):
            entry["placement_on_stubs"] = expected
    result["runs"] = [old for old in result["runs"] if not _replaced(old, entry)] + [entry]
    write_result(result, folder)
    append_finding(folder, "generate " + " ".join(str(entry[k]) for k in KEY), entry)
    print(line(entry), flush=True)


def _replaced(old: dict[str, Any], new: dict[str, Any]) -> bool:
    return all(old[k] == new[k] or (k, old[k]) == ("coreset", "any") for k in KEY)


def line(r: dict[str, Any]) -> str:
    """An entry in words."""
    head = f"{r['precision']} coreset {r['coreset']:>3} {r['backend']:<34}"
    for why in ("missing", "broke"):
        if why in r:
            return f"{head} {why}: {r[why]}"
    if "profile" in r:
        return f"{head} {r['profile']['nodes_us']:.0f} us of nodes"
    others = "".join(f"{key.removesuffix('_ms')} {ms:.2f}, " for key, ms in r.items()
                     if key.endswith("_ms") and key != "denoise_ms")
    text = (f"{head} denoise {r['denoise_ms']:7.2f} ms, {others}{r['unique_experts']:.1f} experts, "
            f"nodes {r['placement']}")
    if "placement_on_stubs" in r:
        expected = r["placement_on_stubs"]
        text += " (as on stubs)" if expected == r["placement"] else f" (on stubs {expected})"
    if r["graphs"]:
        text += f", graphs {r['graphs']}"
    if "salient" in r:
        text += f", salient {r['salient']}"
    return text + ("; " + said(r["denoise_ms"], tuple(r["predicted"]), "ms") if "predicted" in r else "")


def table(runs: list[dict[str, Any]]) -> str:
    """What to read first: all lines, and what a coreset brings."""
    lines = [line(r) for r in runs]
    of = {tuple(r[k] for k in KEY): r["denoise_ms"] for r in runs if "denoise_ms" in r}
    for key, ms in of.items():
        dmoe = of.get((*key[:3], CORESETS[0], key[4]))
        if key[3] == "all" and dmoe:
            lines.append(f"{key[2]} {key[4]}: a step of all experts takes {ms / dmoe:.2f} times one of a coreset")
    return "\n".join(lines)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", default="llada2.0-mini")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--precision", choices=["fp16", "fp32", "int8", "int4"], default="fp16")
    parser.add_argument("--prompt", type=int, default=128, help="prompt tokens [128]")
    parser.add_argument("--blocks", type=int, default=3, help="blocks to generate [3]")
    parser.add_argument("--steps", type=int, default=16, help="denoise steps per block, 2 or more [16]")
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="profile N denoise steps, by kind of node")
    parser.add_argument("--salient", type=int, default=0, metavar="M", help="salient steps of this capacity, too")
    parser.add_argument("--work", type=Path, help="scratch folder, needs twice the model's size [a temporary one]; "
                                                  "bundles that are there already are used again")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON [benchmarks/results]")
    parser.add_argument("--cpu", action="store_true", help="the CPU backend only")
    options = parser.parse_args()
    device: Any = None
    if options.cpu:
        about = {"name": f"CPU {platform.machine()}"}
    else:
        require_gpu()
        from dmoe_export.runtime.gpu.device import CudaDevice

        device = CudaDevice.open()
        about = describe_device(device)
    result = describe_run("gpu_generate", about, KernelLibrary(LIBRARY) if LIBRARY.is_file() else None)
    path = result_path(result, options.out)
    before = json.loads(path.read_text()) if path.is_file() else {"runs": [], "commands": []}
    result |= {"runs": before["runs"], "commands": [*before["commands"], result["command"]]}
    mine: list[dict[str, Any]] = []

    def keep(entry: dict[str, Any]) -> None:
        mine.append(entry)
        add_entry(result, options.out, entry)

    with contextlib.nullcontext(options.work) if options.work else tempfile.TemporaryDirectory() as work:
        Path(work).mkdir(parents=True, exist_ok=True)
        run(Path(work), options, device, keep)
    print(f"{path}, milliseconds per forward:\n{table(mine)}")
    raise SystemExit(exit_code(mine))


def exit_code(runs: list[dict[str, Any]]) -> int:
    """1 when a run broke, when nothing could be measured, or when custom ops are required and were missing."""
    required = os.environ.get("DMOE_REQUIRE_CUSTOM_OPS") == "1"
    lost = [r for r in runs if "broke" in r or (required and "missing" in r and r["backend"] in OPS)]
    return int(bool(lost) or not any("denoise_ms" in r for r in runs))


if __name__ == "__main__":
    main()
