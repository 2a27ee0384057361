"""What a miss costs: experts of one layer in slots on the device, some of them read from pinned host memory instead.

    python benchmarks/gpu_residency.py [--out FOLDER]

Beside it the two other things that can be done with such an expert: copy it to a slot, and compute it on the CPU (with
PyTorch, weights in half precision); and how long it takes to get the pinned memory of one layer's experts (1.6 GB; a
model has 19 such layers). Writes gpu_residency_<device>_<date>.json, each figure to gpu_findings.jsonl as it is known,
prints a short table last. Without a GPU: one sentence, exit code 3.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gpu_common import (
    LIBRARY,
    RESULTS,
    TYPES,
    ExpertPoolC,
    ExpertsShapeC,
    KernelLibrary,
    describe_device,
    describe_run,
    require_gpu,
    time_calls,
    write_result,
)
from gpu_findings import append_finding
from gpu_kernels import Memory, balanced_ids

MINI = (256, 8, 2048, 512)  # E, k, H, I of LLaDA2.0-mini
TOKENS, ACTIVE = 32, 15
MISSES = (0, 1, 2, 4, 8, 15)
Keep = Callable[[str, Any], None]


def measure_misses(device: Any, stream: int, library: KernelLibrary, geometry: tuple[int, int, int, int], tokens: int,
                   active: int, misses: tuple[int, ...], keep: Keep, kind: str = "fp16") -> list[dict[str, Any]]:
    """Time of the experts op with so many of its `active` experts not in a slot; of pinning their master copy."""
    experts, k, hidden, width = geometry
    shape = ExpertsShapeC(tokens, k, experts, hidden, width, TYPES[kind])
    sizes = (2 * width * hidden * 2, hidden * width * 2)
    results = []
    with Memory(device, stream) as memory:
        pools = [memory.random_halfs(active * size // 2, kind, hidden**-0.5) for size in sizes]
        start = time.perf_counter()
        masters = [device.pinned(experts * size) for size in sizes]
        took = time.perf_counter() - start
        keep("residency pinning", {"bytes": experts * sum(sizes), "seconds": took,
                                   "bytes_per_second": experts * sum(sizes) / took})
        for master, pool, size in zip(masters, pools, sizes, strict=True):
            for expert in range(experts):
                slot = expert % active * size
                device.copy(master[expert * size:].ctypes.data, pool + slot, size, stream)
        device.synchronize(stream)
        states = memory.random_halfs(tokens * hidden, kind, 1.0)
        ids = memory.put(balanced_ids(tokens, k, np.arange(active)))
        weights = memory.put(np.full((tokens, k), 2.5 / k, np.float32))
        mixed, workspace = memory.empty(tokens * hidden * 2), memory.empty(library.workspace_bytes(shape))
        addresses = [states, ids, weights, *(m.ctypes.data for m in masters), mixed, workspace]
        for missing in misses:
            table = np.full(experts, -1, np.int32)
            table[missing:active] = np.arange(missing, active)
            pool = ExpertPoolC(active, memory.put(table), *pools)
            timing = time_calls(device, stream, [lambda s, p=pool: library.experts_resident(shape, p, addresses, s)])
            results.append({"misses": missing, "miss_bytes": missing * sum(sizes), **timing})
            keep(f"residency {missing} misses", results[-1])
        results[0]["copy"] = time_calls(device, stream, [lambda s: [device.copy(to, master.ctypes.data, size, s) for
                                        to, master, size in zip(pools, masters, sizes, strict=True)]])
    return results


def measure_cpu(hidden: int, width: int, tokens: int, repeats: int = 20) -> dict[str, Any] | None:
    """Milliseconds of one expert for `tokens` tokens on the CPU, other experts in between; None without PyTorch."""
    try:
        import torch
    except ImportError:
        return None
    many = [(torch.randn(2 * width, hidden).half(), torch.randn(hidden, width).half()) for _ in range(repeats)]
    states, times = torch.randn(tokens, hidden).half(), []
    for gate_up, down in many:
        start = time.perf_counter()
        gate, up = (states @ gate_up.T).unflatten(-1, (-1, 2)).unbind(-1)
        (torch.nn.functional.silu(gate) * up) @ down.T
        times.append(1e3 * (time.perf_counter() - start))
    return {"ms": float(np.median(times)), "threads": torch.get_num_threads()}


def run(device: Any, library: KernelLibrary, geometry: tuple[int, int, int, int] = MINI, tokens: int = TOKENS,
        active: int = ACTIVE, misses: tuple[int, ...] = MISSES,
        keep: Keep = lambda name, value: None) -> dict[str, Any]:
    """All of it, as one JSON object; `keep` gets each figure as soon as it is known."""
    stream = device.stream()
    result = describe_run("gpu_residency", describe_device(device), library)
    result["sizes"] = dict(zip(("experts", "k", "hidden", "width"), geometry, strict=True)) | {"tokens": tokens,
                                                                                          "active": active}
    kept: dict[str, Any] = {}

    def both(name: str, value: Any) -> None:
        kept[name] = value
        keep(name, value)

    result["resident"] = found = measure_misses(device, stream, library, geometry, tokens, active, misses, both)
    result["pinning"] = kept["residency pinning"]
    none, most = found[0], found[-1]
    extra = (most["ms"] - none["ms"]) / most["misses"]
    result["ms_per_miss"] = extra
    result["miss_bytes_per_second"] = most["miss_bytes"] / most["misses"] / extra * 1e3 if extra > 0 else None
    result["ms_per_copy"] = none["copy"]["ms"]
    result["cpu"] = measure_cpu(geometry[2], geometry[3], max(1, tokens * geometry[1] // active))
    return result


def table(result: dict[str, Any]) -> str:
    """What to read first."""
    lines = [f"{r['misses']:>3} misses: {1e3 * r['ms']:>8.1f} us" for r in result["resident"]]
    cpu = f"{result['cpu']['ms']:.3f} ms on {result['cpu']['threads']} threads" if result["cpu"] else "not measured"
    pinning = result["pinning"]
    lines.append(f"pinning {pinning['bytes'] / 1e9:.2f} GB: {pinning['seconds']:.2f} s, "
                 f"{pinning['bytes_per_second'] / 1e9:.2f} GB/s")
    return "\n".join([*lines, f"a miss: {result['ms_per_miss']:.3f} ms read by the kernel, "
                      f"{result['ms_per_copy']:.3f} ms copied to a slot, {cpu} computed on the CPU (without "
                      "the waiting)"])


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON [benchmarks/results]")
    options = parser.parse_args()
    require_gpu()
    from dmoe_export.runtime.gpu.device import CudaDevice

    result = run(CudaDevice.open(), KernelLibrary(LIBRARY), keep=partial(append_finding, options.out))
    print(f"{write_result(result, options.out)}\n{table(result)}")


if __name__ == "__main__":
    main()
