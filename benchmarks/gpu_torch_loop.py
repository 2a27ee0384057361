"""The experts op as PyTorch code writes it: a loop over the active experts. A baseline on the same GPU and memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Step = tuple[int, Any, Any]  # expert, its tokens, their weights


def torch_missing() -> str | None:
    """Why there is no baseline; None when there can be one."""
    try:
        import torch
    except ImportError as error:
        return str(error)
    return None if torch.cuda.is_available() else "this torch has no CUDA"


class _Words:
    """16-bit words at an address, as torch takes over memory of others."""

    def __init__(self, address: int, shape: tuple[int, ...]) -> None:
        self.__cuda_array_interface__ = {"shape": shape, "typestr": "<i2", "data": (address, False), "version": 3,
                                         "strides": None}


def loop(states: Any, gate_up: Any, down: Any, steps: list[Step]) -> Any:
    """Mixed output [N, H] float32, one expert after the other."""
    import torch

    mixed = torch.zeros(states.shape, dtype=torch.float32, device=states.device)
    for expert, tokens, weights in steps:
        gate, up = (states[tokens] @ gate_up[expert].T).unflatten(-1, (-1, 2)).unbind(-1)
        mixed.index_add_(0, tokens, ((torch.nn.functional.silu(gate) * up) @ down[expert].T).float() * weights)
    return mixed


def steps_of(ids: np.ndarray, weight: float, place: str) -> list[Step]:
    """What the loop needs, prepared outside the timing: in favour of the baseline."""
    import torch

    return [(int(expert), torch.from_numpy(np.nonzero(ids == expert)[0]).to(place),
             torch.full((int((ids == expert).sum()), 1), weight, device=place)) for expert in np.unique(ids)]


def measure_torch_loop(kind: str, addresses: tuple[int, int, int], sets: list[np.ndarray], hidden: int, width: int,
                       experts: int) -> dict[str, Any]:
    """Milliseconds per call, eager (with its launches) and from a CUDA graph (without them)."""
    import torch

    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[kind]
    shapes = [(len(sets[0]), hidden), (experts, 2 * width, hidden), (experts, hidden, width)]
    torch.cuda.synchronize()
    states, gate_up, down = (torch.as_tensor(_Words(*x), device="cuda").view(dtype)
                             for x in zip(addresses, shapes, strict=True))
    prepared = [steps_of(ids, 2.5 / ids.shape[1], "cuda") for ids in sets]

    def all_sets() -> None:
        for steps in prepared:
            loop(states, gate_up, down, steps)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        all_sets()  # handles and kernels are made
    torch.cuda.synchronize()
    result = {"eager_ms": _median(torch, all_sets, 5) / len(sets)}
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            all_sets()
        result["graph_ms"] = _median(torch, graph.replay, 10) / len(sets)
    except RuntimeError as error:
        result["no_graph"] = str(error).splitlines()[0]
    torch.cuda.synchronize()
    return result


def _median(torch: Any, work: Callable[[], None], times: int) -> float:
    measured = []
    for _ in range(times + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        measured.append(begin.elapsed_time(end))
    return float(np.median(measured[2:]))
