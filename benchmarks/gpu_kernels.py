"""The CUDA kernels alone: experts and head against a device copy of the same run, dMoE against token routing, routing.

    python benchmarks/gpu_kernels.py [--out FOLDER] [--quick]

Writes gpu_kernels_<device>_<date>.json, each result to gpu_findings.jsonl as it is known, prints a short table last,
with the predictions of predictions.json. Without a GPU: one sentence, exit code 3.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gpu_common import (
    LIBRARY,
    MODES,
    RESULTS,
    TYPES,
    ExpertsShapeC,
    KernelLibrary,
    QuantisationC,
    RouteAttributesC,
    describe_device,
    describe_run,
    require_gpu,
    time_calls,
    write_result,
)
from gpu_findings import append_finding
from gpu_head import measure_candidates, measure_head
from gpu_memory import Memory
from gpu_outcome import against, predicted_experts, predicted_route, said

from dmoe_export.runtime.gpu.candidates import CandidateKernel

GEOMETRIES = {"mini": (256, 8, 2048, 512), "flash": (256, 8, 4096, 1024)}  # E, k, H, I of LLaDA2.0
MANY = {(256, 8, 2048, 512): (1024, 4096), (64, 8, 2048, 1024): (512, 1024, 4096)}  # tokens; LLaDA2.0-mini, LLaDA-MoE
TOKENS = (32, 128, 512)
ACTIVE = (10, 15, 20, 40, 70, 87, 256)
DMOE, TOKEN_ROUTING = 15, 87  # experts of a block of 32 in a layer, with a coreset and without one
HEADS = {"mini": (157_184, 2048)}  # V, H
HEAD_ROWS = (1, 2, 4, 8)  # of 32 wanted tokens
CANDIDATES = (1, 50, 1024)
GROUP = 64  # integer weights per scale
ROUTE_EXPERTS, ROUTE_TOKENS, ROUTE_CALLS = (64, 256, 1024), (32, 128, 512, 4096), 20


def measure_copy(device: Any, stream: int, size: int) -> dict[str, Any]:
    """Device to device, bytes read and written counted: the ceiling of this run."""
    with Memory(device, stream) as memory:
        source, to = memory.random_halfs(size // 2, "fp16", 1.0), memory.empty(size)
        timing = time_calls(device, stream, [lambda s: device.copy(to, source, size, s)])
    return {"bytes": 2 * size, **timing, "bytes_per_second": 2 * size / timing["ms"] * 1e3}


def balanced_ids(tokens: int, k: int, chosen: np.ndarray) -> np.ndarray:
    """Ids [N, k], distinct within a token; every chosen expert the same number of times, give or take one."""
    return chosen[np.arange(tokens * k) % len(chosen)].reshape(tokens, k).astype(np.int32)


def disjoint_sets(experts: int, active: int, most: int = 16) -> list[np.ndarray]:
    """Sets of experts without a common one, to take in turn: what the L2 cache holds is then of no use."""
    order = np.random.default_rng(active).permutation(experts)
    return [order[i * active:(i + 1) * active] for i in range(min(most, experts // active))]


def measure_experts(device: Any, stream: int, library: KernelLibrary, geometry: tuple[int, int, int, int], kind: str,
                    cases: Sequence[tuple[int, int]], baseline: Callable[..., dict[str, Any]] | None,
                    ) -> list[dict[str, Any]]:
    """The experts op over (tokens, active experts); `baseline` measures the same work another way."""
    experts, k, hidden, width = geometry
    results = []
    with Memory(device, stream) as memory:
        weights = (memory.random_halfs(experts * 2 * width * hidden, kind, hidden**-0.5),
                   memory.random_halfs(experts * hidden * width, kind, width**-0.5))
        for tokens, active in cases:
            if k <= active <= min(experts, tokens * k):
                shape = ExpertsShapeC(tokens, k, experts, hidden, width, TYPES[kind])
                results.append({"experts": experts, "k": k, "hidden": hidden, "width": width, "type": kind,
                                "tokens": tokens, "active": active, "expert_bytes": active * 3 * width * hidden * 2,
                                **measure_case(device, stream, library, shape, active, weights, baseline)})
    return results


def measure_quantised(device: Any, stream: int, library: KernelLibrary, geometry: tuple[int, int, int, int], bits: int,
                      cases: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """The same with weights of 8 or 4 bits, random in any order; scales count as bytes of an expert."""
    experts, k, hidden, width = geometry
    values = 3 * hidden * width
    results = []
    with Memory(device, stream) as memory:
        sizes = (2 * width * hidden, hidden * width)
        weights = tuple(memory.random_bytes(experts * size * bits // 8) for size in sizes)
        scales = [memory.random_halfs(experts * size // GROUP, "fp16", 2.0 ** (1 - bits) * hidden**-0.5)
                  for size in sizes]
        quantisation = QuantisationC(bits, GROUP, *scales)
        for tokens, active in cases:
            if k <= active <= min(experts, tokens * k):
                shape = ExpertsShapeC(tokens, k, experts, hidden, width, TYPES["fp16"])
                results.append({"experts": experts, "k": k, "hidden": hidden, "width": width, "type": f"int{bits}",
                                "tokens": tokens, "active": active,
                                "expert_bytes": active * (values * bits // 8 + values // GROUP * 2),
                                **measure_case(device, stream, library, shape, active, weights, None, quantisation)})
    return results


def measure_case(device: Any, stream: int, library: KernelLibrary, shape: ExpertsShapeC, active: int,
                  weights: tuple[int, ...], baseline: Callable[..., dict[str, Any]] | None,
                  quantisation: QuantisationC | None = None) -> dict[str, Any]:
    """Time of one (tokens, active experts) on weights that are there."""
    kind = next(name for name, number in TYPES.items() if number == shape.type)
    tokens, k, hidden = shape.tokens, shape.places, shape.hidden
    with Memory(device, stream) as memory:
        states = memory.random_halfs(tokens * hidden, kind, 1.0)
        pair_weights = memory.put(np.full((tokens, k), 2.5 / k, np.float32))
        sets = [balanced_ids(tokens, k, chosen) for chosen in disjoint_sets(shape.experts, active)]
        assert all(len(np.unique(ids)) == active for ids in sets)
        mixed, workspace = memory.empty(tokens * hidden * 2), memory.empty(library.workspace_bytes(shape))

        def on(ids: int) -> Callable[[int], None]:
            addresses = [states, ids, pair_weights, *weights, mixed, workspace]
            if quantisation:
                return lambda s: library.experts_quantised(shape, quantisation, addresses, s)
            return lambda s: library.experts(shape, addresses, s)

        result: dict[str, Any] = {"sets": len(sets), **time_calls(device, stream, [on(memory.put(x)) for x in sets])}
        result["flops_per_second"] = 6.0 * tokens * k * hidden * shape.width / result["ms"] * 1e3
        if baseline:
            result["torch"] = baseline(kind, (states, *weights), sets, hidden, shape.width, shape.experts)
    return result


def add_rates(results: list[dict[str, Any]], copy_rate: float, l2_bytes: int, device: str) -> None:
    """Bytes of the active experts' weights over the time, against the copy's rate; whether L2 was cold; prediction."""
    for r in results:
        r["bytes_per_second"] = r["expert_bytes"] / r["ms"] * 1e3
        r["of_copy"] = r["bytes_per_second"] / copy_rate
        r["l2_cold"] = r["sets"] * r["expert_bytes"] >= 3 * l2_bytes  # read between two uses of the same bytes
        if "graph_ms" in r.get("torch", {}):
            r["torch_over_ours"] = r["torch"]["graph_ms"] / r["ms"]
        r |= against(1e3 * r["ms"], predicted_experts(device, r))


def measure_route(device: Any, stream: int, library: KernelLibrary, experts: int, tokens: int, mode: str,
                  ) -> dict[str, Any]:
    """One launch for all blocks of 32, with the coreset written."""
    k, rng = 8, np.random.default_rng(experts)
    groups = (1, 1) if mode == "top_c" else (8, 4)  # LLaDA2.2 has none
    attributes = RouteAttributesC(MODES[mode], 32, k, *groups, 0, 1, 2.5)
    with Memory(device, stream) as memory:
        # popular experts, so that coresets are small as in a trained model
        logits = rng.standard_normal((tokens, experts), np.float32) + 1.5 * rng.standard_normal(experts, np.float32)
        inputs = [memory.put(x) for x in (logits.astype(np.float32), np.zeros(experts, np.float32),
                                          np.arange(tokens, dtype=np.int64), np.float32([0.6]), np.int64([12]),
                                          np.int64([48]))]
        outputs = [memory.empty(tokens * size) for size in (4 * k, 4 * k, experts)]
        timing = time_calls(device, stream, [
            lambda s: library.route(attributes, 1, tokens, experts, [*inputs, *outputs], s)] * ROUTE_CALLS)
    return {"mode": mode, "experts": experts, "tokens": tokens, "k": k, **timing,
            **against(1e3 * timing["ms"], predicted_route(device.name, experts, tokens))}


def routing_ratio(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A block of 32 with a coreset's experts against one with token routing's: time and bytes."""
    at = {(r["hidden"], r["type"], r["active"]): r for r in results if r["tokens"] == 32}
    return [{"hidden": hidden, "type": kind, "dmoe_experts": DMOE, "token_experts": TOKEN_ROUTING,
             "time_ratio": at[hidden, kind, TOKEN_ROUTING]["ms"] / dmoe["ms"],
             "bytes_ratio": TOKEN_ROUTING / DMOE}
            for (hidden, kind, active), dmoe in at.items() if active == DMOE and (hidden, kind, TOKEN_ROUTING) in at]


def run(device: Any, library: KernelLibrary, quick: bool = False, geometries: Any = None,
        baseline: Callable[..., dict[str, Any]] | None = None, copy_bytes: int = 2 << 30, many: Any = None,
        keep: Callable[[str, Any], None] = lambda name, value: None) -> dict[str, Any]:
    """All of it, as one JSON object; `keep` gets what is known so far, part by part."""
    about, stream = describe_device(device), device.stream()
    result = describe_run("gpu_kernels", about, library)
    result["copy"] = measure_copy(device, stream, min(copy_bytes, device.memory()[0] // 4))
    keep("kernels copy", result["copy"])
    cases = [(tokens, active) for tokens in (TOKENS[:1] if quick else TOKENS) for active in ACTIVE]
    result["experts"] = []

    def add(results: list[dict[str, Any]]) -> None:
        add_rates(results, result["copy"]["bytes_per_second"], about["l2_bytes"], about["name"])
        result["experts"] += results
        for r in results:
            keep(f"kernels experts {r['type']} H{r['hidden']} N{r['tokens']} active {r['active']}", r)

    for name, geometry in (geometries or GEOMETRIES).items():
        for kind in TYPES if name == "mini" else ["fp16"]:
            needed = 3 * geometry[0] * geometry[2] * geometry[3] * 2
            if needed > 0.8 * device.memory()[0]:
                result.setdefault("left_out", []).append(f"{name}: its weights of {needed} bytes do not fit")
                continue
            add(measure_experts(device, stream, library, geometry, kind, cases, baseline))
        for bits in (8, 4) if name == "mini" else ():
            add(measure_quantised(device, stream, library, geometry, bits, cases))
    for geometry, many_tokens in (many or ({} if quick else MANY)).items():
        add(measure_experts(device, stream, library, geometry, "fp16", [(n, geometry[0]) for n in many_tokens], None))
    result["dmoe_against_token_routing"] = routing_ratio(result["experts"])
    result["route"] = [measure_route(device, stream, library, experts, tokens, mode) for mode in MODES
                       for experts in (ROUTE_EXPERTS[:2] if quick else ROUTE_EXPERTS)
                       for tokens in (ROUTE_TOKENS[:1] if quick else ROUTE_TOKENS)]
    keep("kernels route", result["route"])
    result["head"] = [measure_head(device, stream, library, kind, size, rows, result["copy"]["bytes_per_second"])
                      for size in HEADS.values() for kind in TYPES for rows in (HEAD_ROWS[:1] if quick else HEAD_ROWS)]
    keep("kernels head", result["head"])
    result["candidates"] = [measure_candidates(device, stream, CandidateKernel(library.path), size[0], count)
                            for size in HEADS.values() for count in CANDIDATES]
    keep("kernels candidates", result["candidates"])
    # Once more: a clock that moved during the run shows in the difference.
    result["copy_again"] = measure_copy(device, stream, min(copy_bytes, device.memory()[0] // 4))
    return result


def table(result: dict[str, Any]) -> str:
    """What to read first."""
    copy = result["copy"]["bytes_per_second"]
    lines = [f"{result['device']['name']}: device copy {copy / 1e12:.2f} TB/s read and written, at the end "
             f"{result['copy_again']['bytes_per_second'] / 1e12:.2f}",
             f"{'H':>5} {'type':>4} {'N':>4} {'active':>6} {'us':>8} {'spread':>6} {'TB/s':>6} {'of copy':>7} "
             f"{'TFLOP/s':>7} {'torch/ours':>10}"]
    for r in result["experts"]:
        lines.append(f"{r['hidden']:>5} {r['type']:>4} {r['tokens']:>4} {r['active']:>6} {1e3 * r['ms']:>8.1f} "
                     f"{r['spread']:>6.1%} {r['bytes_per_second'] / 1e12:>6.2f} {r['of_copy']:>7.0%} "
                     f"{r['flops_per_second'] / 1e12:>7.0f} {r.get('torch_over_ours', float('nan')):>10.1f}"
                     + ("" if r["l2_cold"] else "  (L2 warm)") + _beside(r))
    lines += [f"dMoE ({r['dmoe_experts']} experts) against token routing ({r['token_experts']}), H {r['hidden']} "
              f"{r['type']}: {r['time_ratio']:.2f} times faster; bytes {r['bytes_ratio']:.2f}"
              for r in result["dmoe_against_token_routing"]]
    lines += [f"route {r['mode']:>6} E {r['experts']:>4} T {r['tokens']:>4}: {1e3 * r['ms']:.2f} us{_beside(r)}"
              for r in result["route"] if r["tokens"] in (32, 512)]
    lines += [f"head {r['type']} V {r['vocabulary']} H {r['hidden']} N {r['tokens']:>3}: {1e3 * r['ms']:.1f} us, "
              f"{r['bytes_per_second'] / 1e12:.2f} TB/s, {r['of_copy']:.0%} of copy{_beside(r)}"
              for r in result["head"]]
    lines += [f"candidates {r['candidates']:>4} of V {r['vocabulary']} N {r['tokens']:>3}: {1e3 * r['ms']:.1f} us"
              for r in result["candidates"]]
    return "\n".join(lines)


def _beside(r: dict[str, Any]) -> str:
    return "  " + said(1e3 * r["ms"], tuple(r["predicted"]), "us") if "predicted" in r else ""


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON [benchmarks/results]")
    parser.add_argument("--quick", action="store_true", help="32 tokens and few routing sizes only")
    parser.add_argument("--no-torch", action="store_true", help="without the PyTorch baseline")
    options = parser.parse_args()
    require_gpu()
    from dmoe_export.runtime.gpu.device import CudaDevice

    baseline = None
    if not options.no_torch:
        from gpu_torch_loop import measure_torch_loop, torch_missing

        if reason := torch_missing():
            print(f"Without the PyTorch baseline: {reason}")
        else:
            baseline = measure_torch_loop
    result = run(CudaDevice.open(), KernelLibrary(LIBRARY), options.quick, baseline=baseline,
                 keep=partial(append_finding, options.out))
    path = write_result(result, options.out)
    print(f"{path}\n{table(result)}")


if __name__ == "__main__":
    main()
