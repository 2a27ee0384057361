"""Runs a bundle on ONNX Runtime's real CUDA provider over the stubs, and writes what it asked of the device as JSON.

    python tests/cuda_stubs/drive.py BUNDLE --out FILE [--no-bodies | --salient CAPACITY] [--prefill TOKENS]

In the environment that prepare.py prints. Kernels do nothing here, so tokens mean nothing; what is counted is real:
where nodes are placed, which kernels are launched, what a step asks of the device, how many calls of CUDA it takes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import onnxruntime as ort
from stub_cuda import StubDevice

from dmoe_export.bundle.reader import Bundle, open_bundle
from dmoe_export.generator import Generator
from dmoe_export.runtime.gpu import custom_ops as ort_custom_ops
from dmoe_export.runtime.gpu.device import DeviceError
from dmoe_export.runtime.gpu.onnxruntime import open_onnxruntime_cuda

OPTIONS: dict[str, Any] = {"acceptance": "fixed", "steps": 8, "eos_id": -1, "early_stop": False}
KINDS = {"launches": "kernel", "copies": "copy", "sets": "set", "library_calls": "library", "host_functions": "host"}


def summary(counts: Counter[str], seconds: float) -> dict[str, Any]:
    """Operations of the device by kind, and CUDA calls of the host."""
    kinds = {name: counts[f"op:{kind}"] for name, kind in KINDS.items()}
    calls = {name.removeprefix("call:"): count for name, count in counts.items() if name.startswith("call:")}
    return {"operations": sum(kinds.values()), **kinds, "host_calls": sum(calls.values()), "calls": calls,
            "host_ms": 1e3 * seconds}


def run(bundle: Bundle, prompts: list[list[int]], new_tokens: int, asked: dict[str, Any] | None = None,
        **how: Any) -> dict[str, Any]:
    """One generation; every forward's counts, and a denoise step's as it is when nothing is new any more.

    `asked`: options beside the usual ones.
    """
    device = StubDevice()
    backend = open_onnxruntime_cuda(bundle, device, **how)
    forward, steps, replays = backend.forward, [], []
    shapes, violations = set(), []
    kernels: set[str] = set()
    prefills: list[tuple[int, dict[str, Any]]] = []

    def counted(inputs: Any, cache: Any) -> Any:
        replayed = backend.graphs.replayed if backend.graphs else 0
        device.reset()
        start = time.perf_counter()
        outputs = forward(inputs, cache)
        counts = device.counts()
        found = summary(counts, time.perf_counter() - start)
        kernels.update(name.removeprefix("kernel:") for name in counts if name.startswith("kernel:"))
        violations.extend(device.violations())
        shapes.add((*inputs.input_ids.shape, cache.slab.length))
        if inputs.want_keys_values:
            prefills.append((inputs.input_ids.shape[1], found))
        if (inputs.logit_rows >= 0).any() and not inputs.want_keys_values:
            again = backend.graphs is not None and backend.graphs.replayed > replayed
            (replays if again else steps).append(found)
        return outputs

    backend.forward = counted  # type: ignore[method-assign]
    answers = Generator(bundle, backend).generate(prompts, max_new_tokens=new_tokens, **OPTIONS, **(asked or {}))
    graphs = backend.graphs
    return {"placement": backend.placement, "cpu_ops": _on_the_cpu(backend._executor), "violations": violations,
            "tokens": [len(answer.token_ids) for answer in answers], "shapes": sorted(shapes),
            "kernels": sorted(kernels), "prefill": _widest(prefills), "step": _usual(steps),
            "replayed_step": _usual(replays), "graphs": graphs and _recordings(graphs)}


def salient(bundle: Bundle, prompt: list[int], capacity: int) -> dict[str, Any]:
    """Salient steps of one generation: counts by graph, and bytes of device memory before and after the first step."""
    device = StubDevice()
    backend = open_onnxruntime_cuda(bundle, device, custom_ops="on")
    graphs = backend.salient_graphs(capacity)
    step, seen, violations = graphs.run, {}, []

    def counted(name: Any, *others: Any) -> Any:
        before = graphs.opened[name][1].replayed if name in graphs.opened else 0
        device.reset()
        start = time.perf_counter()
        got = step(name, *others)
        found = summary(device.counts(), time.perf_counter() - start)
        violations.extend(device.violations())
        seen.setdefault((name, graphs.opened[name][1].replayed > before), []).append(found)
        return got

    graphs.run = counted  # type: ignore[method-assign]
    bytes_used = [_used(device)]
    answers = Generator(bundle, backend).generate([prompt], max_new_tokens=96, salient_threshold=0.9,
                                                  salient_capacity=capacity, **OPTIONS)
    bytes_used.append(_used(device))
    return {"violations": violations, "bytes_used": bytes_used, "tokens": [len(a.token_ids) for a in answers],
            "graphs": {str(name): {"placement": executor.placement, "cpu_ops": _on_the_cpu(executor),
                                   "step": _usual(seen.get((name, False), [])),
                                   "replayed_step": _usual(seen.get((name, True), [])), **_recordings(recorded)}
                       for name, (executor, recorded) in graphs.opened.items()}}


def _used(device: StubDevice) -> int:
    free, total = device.memory()
    return total - free


def _on_the_cpu(executor: Any) -> dict[str, int]:
    return dict(Counter(node.op_type for part in executor._session.get_provider_graph_assignment_info()
                        if part.ep_name != "CUDAExecutionProvider" for node in part.get_nodes()))


def _recordings(graphs: Any) -> dict[str, Any]:
    return {"recorded": graphs.recorded, "replayed": graphs.replayed, "off": graphs.off}


def _widest(prefills: list[tuple[int, dict[str, Any]]]) -> dict[str, Any]:
    """The forward of the most tokens; of those, the one with the fewest calls."""
    tokens = max(tokens for tokens, _ in prefills)
    return {"tokens": tokens, **min((found for of, found in prefills if of == tokens),
                                    key=lambda found: found["host_calls"])}


def _usual(found: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The step with the fewest calls: the first of a shape allocates. Its time is the median of all of that kind."""
    if not found:
        return None
    least = min(found, key=lambda step: step["host_calls"])
    alike = [step["host_ms"] for step in found if step["host_calls"] == least["host_calls"]]
    return {**least, "host_ms": statistics.median(alike), "steps": len(alike)}


def rules() -> dict[str, str]:
    """That the stubs refuse what CUDA refuses: without it, no violation would mean nothing."""
    device, said = StubDevice(), {}
    stream, pinned, block = device.stream(), device.pinned(256), device.allocate(256)
    for name, work in (("wait", lambda: device.synchronize(stream)),
                       ("host copy", lambda: device.copy(block, pinned.ctypes.data, 256, stream)),
                       ("other stream", lambda: device.fill(block, 0, 256, device.stream())),
                       ("device copy", lambda: device.copy(block, block, 256, stream))):
        device.reset()
        device.begin_capture(stream)
        with contextlib.suppress(DeviceError):
            work()
        try:
            device.free_graph(device.end_capture(stream, host_reads=False))
            said[name] = "; ".join(device.violations())
        except DeviceError as error:
            said[name] = str(error)
    device.reset()
    return said


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--no-bodies", action="store_true", help="leave the graph's own bodies out")
    parser.add_argument("--prefill", type=int, default=0, metavar="TOKENS", help="count a long prompt's forward, too")
    parser.add_argument("--salient", type=int, metavar="CAPACITY", help="salient steps, and nothing else")
    options = parser.parse_args()
    ort_custom_ops.INSTALLED = Path(os.environ["DMOE_CUDA_STUBS_OPS"])
    bundle = open_bundle(options.bundle, "sizes")
    prompt = [5 + i % 80 for i in range(60)]
    if options.salient:
        options.out.write_text(json.dumps(salient(bundle, prompt, options.salient), indent=1) + "\n")
        return
    ways = {"custom ops": {"cuda_graphs": False, "custom_ops": "on"},
            "custom ops, recorded": {"custom_ops": "on"},
            **({} if options.no_bodies else {"bodies": {"cuda_graphs": False, "custom_ops": "off"}})}
    result = {"onnxruntime": ort.__version__, "rules": rules(),
              "runs": {name: run(bundle, [prompt], 96, **how) for name, how in ways.items()},
              "drawing": run(bundle, [prompt], 96, {"temperature": 0.8, "top_k": 5}, custom_ops="on"),
              "batch": run(bundle, [prompt, prompt[:9], prompt[:40]], 160, custom_ops="on")}
    if options.prefill:
        tokens = [5 + i % 80 for i in range(options.prefill)]
        result["prefill"] = run(bundle, [tokens], 32, cuda_graphs=False, custom_ops="on")["prefill"]
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
