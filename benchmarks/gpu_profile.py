"""Where the time of a denoise step goes on ONNX Runtime's CUDA provider: by kind of node, the longest first.

    python benchmarks/gpu_profile.py BUNDLE [--steps 3] [--out FILE]

ONNX Runtime's wheels report no times of the device, so this program sets CUDA_LAUNCH_BLOCKING=1: a launch then returns
when it is done, and a node's time is that of its launches, its work and the waiting. Sums are thus larger than a step's
time; what is to be seen is the shares. Steps are not recorded here. Without a GPU: one sentence, exit code 3.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

ROWS = 15


def denoise_windows(events: list[dict[str, Any]], phases: list[bool], steps: int) -> list[tuple[int, int]]:
    """Begin and end of the last `steps` runs that were denoise steps; `phases` says which of all runs were."""
    runs = sorted((event["ts"], event["ts"] + event["dur"]) for event in events if event.get("name") == "model_run")
    if len(runs) != len(phases):
        raise ValueError(f"The profile has {len(runs)} runs where {len(phases)} were made.")
    return [window for window, denoise in zip(runs, phases, strict=True) if denoise][-steps:]


def summary(events: list[dict[str, Any]], phases: list[bool], steps: int) -> dict[str, Any]:
    """Microseconds and calls of a step by kind of node and provider."""
    windows = denoise_windows(events, phases, steps)
    times: dict[tuple[str, str], list[int]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time") and any(
                begin <= event["ts"] <= end for begin, end in windows):
            about = event["args"]
            times[about["op_name"], about["provider"].removesuffix("ExecutionProvider")].append(event["dur"])
    rows = [{"op": op, "provider": provider, "calls": len(found) / len(windows), "us": sum(found) / len(windows)}
            for (op, provider), found in times.items()]
    rows.sort(key=lambda row: -row["us"])
    providers: dict[str, float] = defaultdict(float)
    for row in rows:
        providers[row["provider"]] += row["us"]
    return {"steps": len(windows), "run_us": sum(end - begin for begin, end in windows) / len(windows),
            "nodes_us": sum(row["us"] for row in rows), "nodes": sum(row["calls"] for row in rows), "rows": rows[:ROWS],
            "providers_us": dict(providers),
            "what": "host time of nodes, each waited for (CUDA_LAUNCH_BLOCKING=1)"}


def profile(bundle: Any, backend: Any, steps: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Of `steps` denoise steps after as many that warm up; `backend` was opened with a profile."""
    from dmoe_export.generator import Generator

    phases, forward = [], backend.forward

    def noted(inputs: Any, cache: Any) -> Any:
        phases.append(bool((inputs.logit_rows >= 0).any()) and not inputs.want_keys_values)
        return forward(inputs, cache)

    backend.forward = noted
    options = {"max_new_tokens": backend.routing.block_length, "acceptance": "fixed", "steps": steps, "eos_id": -1,
               "early_stop": False}
    for _ in range(2):
        Generator(bundle, backend).generate([[5 + i % 80 for i in range(128)]], **options, **settings)
    path = backend.end_profile()
    try:
        return summary(json.loads(path.read_text()), phases, steps)
    finally:
        path.unlink()


def table(result: dict[str, Any]) -> str:
    """What to read first."""
    lines = [f"profile of a denoise step: {result['nodes']:.0f} nodes, {result['nodes_us']:.0f} us, {result['what']}"]
    lines += [f"{row['op']:<24} {row['provider']:<5} {row['calls']:>6.1f} calls {row['us']:>9.1f} us "
              f"{row['us'] / result['nodes_us']:>6.1%}" for row in result["rows"]]
    return "\n".join(lines)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    os.environ["CUDA_LAUNCH_BLOCKING"] = "1"  # before CUDA is loaded
    from gpu_common import require_gpu
    from gpu_generate import coreset_settings

    require_gpu()
    from dmoe_export.bundle.reader import open_bundle
    from dmoe_export.runtime.gpu.onnxruntime import open_onnxruntime_cuda

    bundle = open_bundle(options.bundle, "sizes")
    with tempfile.TemporaryDirectory() as scratch:
        backend = open_onnxruntime_cuda(bundle, cuda_graphs=False, profile=Path(scratch) / "profile")
        result = profile(bundle, backend, options.steps, coreset_settings(bundle, "15"))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
