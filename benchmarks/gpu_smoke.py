"""The first half minute on a GPU: is each kernel right, and how fast; every line is printed as soon as it is known.

    python benchmarks/gpu_smoke.py [--out FOLDER]

The experts op once with fp16, bf16, int8 and int4 weights at LLaDA2.0-mini's size, against float64; one routing block
against a recorded gate of the reference; both timed, beside the prediction. Lines go to FOLDER/gpu_findings.jsonl, too.
Exit code 1 when a result is wrong, 3 (and one sentence) without a GPU. Needs no torch.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gpu_common import (
    LIBRARY,
    MODES,
    RESULTS,
    ROOT,
    TYPES,
    ExpertsShapeC,
    KernelLibrary,
    QuantisationC,
    RouteAttributesC,
    describe_device,
    require_gpu,
)
from gpu_findings import append_finding
from gpu_kernels import (
    DMOE,
    GEOMETRIES,
    GROUP,
    add_rates,
    balanced_ids,
    disjoint_sets,
    measure_case,
    measure_copy,
    measure_route,
)
from gpu_memory import Memory
from gpu_outcome import said

GATE = 1  # of tests/golden/llada2_dmoe: one block of 32 tokens over 256 experts
TOKENS = 32
BOUNDS = {"fp16": 1e-3, "bf16": 8e-3}  # ‖out − ref‖ / ‖ref‖, as tests/gpu demands
Geometry = tuple[int, int, int, int]  # E, k, H, I


class Weights:
    """Random weights of all experts on the device, as its kernels read them, and what each is in float64."""

    def __init__(self, memory: Memory, geometry: Geometry, type_name: str, group: int) -> None:
        experts, _, hidden, width = geometry
        self._memory, self._group = memory, group
        self._shapes = ((2 * width, hidden), (hidden, width))
        self.bits = int(type_name.removeprefix("int")) if type_name.startswith("int") else 16
        self.kind = "fp16" if self.bits < 16 else type_name
        sizes = [rows * depth for rows, depth in self._shapes]
        if self.bits == 16:
            self.addresses = tuple(memory.random_halfs(experts * size, self.kind, depth**-0.5)
                                   for size, (_, depth) in zip(sizes, self._shapes, strict=True))
            self.quantisation = None
            return
        self.addresses = tuple(memory.random_bytes(experts * size * self.bits // 8) for size in sizes)
        self._scales = [memory.random_halfs(experts * size // group, "fp16", 2.0 ** (1 - self.bits) * hidden**-0.5)
                        for size in sizes]
        self.quantisation = QuantisationC(self.bits, group, *self._scales)

    def expert(self, expert: int) -> list[np.ndarray]:
        """gate_up [2I, H] and down [H, I]."""
        return [self._part(part, rows, depth, expert) for part, (rows, depth) in enumerate(self._shapes)]

    def _part(self, part: int, rows: int, depth: int, expert: int) -> np.ndarray:
        size = rows * depth * self.bits // 8
        held = self._memory.written(self.addresses[part], expert * size, size)
        if self.bits == 16:
            return to_float64(held.view(np.uint16), self.kind).reshape(rows, depth)
        size = rows * depth // self._group * 2
        scales = self._memory.written(self._scales[part], expert * size, size).view(np.float16).astype(np.float32)
        scales = scales.reshape(rows // 16, -1, 16).swapaxes(1, 2).reshape(-1, 1)
        values = by_rows(held, self.bits, rows).reshape(-1, self._group).astype(np.float32) - 2 ** (self.bits - 1)
        return (values * scales).astype(np.float16).astype(np.float64).reshape(rows, depth)


def by_rows(held: np.ndarray, bits: int, rows: int) -> np.ndarray:
    """Integers [rows, K] of bytes in fragment order (dmoe_export/ops/experts/fragments.py)."""
    if bits == 4:  # even k come before odd ones
        held = np.stack([held & 15, held >> 4], -1).reshape(-1, 2, 4).swapaxes(1, 2)
    bands, each, found = held.reshape(rows // 16, -1), 8 // bits, []
    whole = bands.shape[1] // (512 * each) * (512 * each)  # of 4 bits the last block may be half as long
    for part, steps in ((bands[:, :whole], each), (bands[:, whole:], 1)):
        blocks = part.reshape(len(bands), -1, 8, 4, steps, 2, 8)  # block, g, q, step, row of two, k
        found.append(blocks.transpose(0, 2, 5, 1, 4, 3, 6).reshape(rows, -1))
    return np.concatenate(found, axis=1)


def to_float64(words: np.ndarray, kind: str) -> np.ndarray:
    """Values of 16-bit words."""
    half = words.view(np.float16) if kind == "fp16" else (words.astype(np.uint32) << 16).view(np.float32)
    return half.astype(np.float64)


def experts_error(memory: Memory, library: KernelLibrary, weights: Weights, shape: ExpertsShapeC,
                  ids: np.ndarray) -> float:
    """‖out − ref‖ / ‖ref‖ of one call; infinite where something is not finite."""
    tokens, hidden = len(ids), shape.hidden
    states = memory.random_halfs(tokens * hidden, weights.kind, 1.0)
    pair_weights = np.random.default_rng(7).standard_normal(ids.shape, np.float32)
    mixed = memory.put(np.full(tokens * hidden, 0xFFFF, np.uint16))  # NaN
    addresses = [states, memory.put(ids), memory.put(pair_weights), *weights.addresses, mixed,
                 memory.empty(library.workspace_bytes(shape))]
    if weights.quantisation:
        library.experts_quantised(shape, weights.quantisation, addresses, memory.stream)
    else:
        library.experts(shape, addresses, memory.stream)
    got = to_float64(memory.get(mixed, (tokens, hidden), np.uint16), weights.kind)
    x = to_float64(memory.written(states, 0, tokens * hidden * 2).view(np.uint16), weights.kind).reshape(tokens, hidden)
    want = np.zeros_like(x)
    for expert in np.unique(ids).tolist():
        gate_up, down = weights.expert(expert)
        at, place = np.nonzero(ids == expert)
        both = x[at] @ gate_up.T
        gate, up = both[:, ::2], both[:, 1::2]
        np.add.at(want, at, (gate / (1 + np.exp(-gate)) * up) @ down.T * np.float64(pair_weights)[at, place, None])
    return float(np.linalg.norm(got - want) / np.linalg.norm(want)) if np.isfinite(got).all() else float("inf")


def smoke_experts(device: Any, stream: int, library: KernelLibrary, geometry: Geometry, type_name: str, active: int,
                  group: int) -> dict[str, Any]:
    """One case: right, and how fast."""
    experts, k, hidden, width = geometry
    with Memory(device, stream) as memory:
        weights = Weights(memory, geometry, type_name, group)
        shape = ExpertsShapeC(TOKENS, k, experts, hidden, width, TYPES[weights.kind])
        error = experts_error(memory, library, weights, shape,
                              balanced_ids(TOKENS, k, disjoint_sets(experts, active)[0]))
        timing = measure_case(device, stream, library, shape, active, weights.addresses, None, weights.quantisation)
    size = 3 * hidden * width
    scales = 0 if weights.bits == 16 else size // group * 2
    return {"type": type_name, "tokens": TOKENS, "active": active, "hidden": hidden, "width": width,
            "expert_bytes": active * (size * weights.bits // 8 + scales), "error": error,
            "right": error <= BOUNDS[weights.kind], **timing}


def smoke_route(device: Any, stream: int, library: KernelLibrary, folder: Path) -> dict[str, Any]:
    """A recorded gate of the dMoE reference: the same coreset, experts and weights; and how fast."""
    data, meta = np.load(folder / "gate.npz"), json.loads((folder / "gate.json").read_text())[GATE]
    logits, bias = data[f"{GATE}.logits"].astype(np.float32), data[f"{GATE}.expert_bias"].astype(np.float32)
    tokens, experts = logits.shape
    attributes = RouteAttributesC(MODES["top_p"], meta["block"], meta["k"], meta["g"], meta["tg"], 0, 1, 2.5)
    with Memory(device, stream) as memory:
        inputs = [memory.put(x) for x in (logits, bias, np.arange(tokens, dtype=np.int64), np.float32([meta["p"]]),
                                          np.int64([meta["guard"]]), np.int64([1]))]
        k = meta["k"]
        outputs = [memory.put(np.full(tokens * size, 0x77, np.uint8)) for size in (4 * k, 4 * k, experts)]
        library.route(attributes, 1, tokens, experts, [*inputs, *outputs], stream)
        ids, weights = memory.get(outputs[0], (tokens, k), np.int32), memory.get(outputs[1], (tokens, k), np.float32)
        coreset = memory.get(outputs[2], (tokens, experts), np.uint8)
    # The reference leaves the coreset at some tokens of other gates; in this one at none.
    order, wanted = np.argsort(ids, -1), np.argsort(data[f"{GATE}.topk_idx"], -1)

    def same(got: np.ndarray, name: str, tolerance: float) -> bool:
        want = np.take_along_axis(data[f"{GATE}.{name}"], wanted, -1)
        return np.allclose(np.take_along_axis(got, order, -1), want, rtol=0, atol=tolerance)

    right = same(ids, "topk_idx", 0) and same(weights, "topk_weight", 1e-5) and (
        coreset == np.repeat(data[f"{GATE}.coreset"], meta["block"], axis=0)).all()
    return {"experts": experts, "tokens": tokens, "right": bool(right),
            **measure_route(device, stream, library, experts, tokens, "top_p")}


def run(device: Any, library: KernelLibrary, tell: Callable[[str, Any, str], None], geometry: Geometry,
        active: int = DMOE, group: int = GROUP, copy_bytes: int = 1 << 30) -> bool:
    """All of it; whether everything was right. `tell` gets name, value and words of each line."""
    stream, about = device.stream(), describe_device(device)
    tell("device", about, f"{about['name']} ({about['target']}), driver {about['driver']}, "
                          f"{about['multiprocessors']} multiprocessors, kernels {library.build}")
    copy = measure_copy(device, stream, copy_bytes)
    rate = copy["bytes_per_second"]
    tell("smoke copy", copy, f"device copy {rate / 1e12:.2f} TB/s read and written")
    right = True
    for type_name in (*TYPES, "int8", "int4"):
        r = smoke_experts(device, stream, library, geometry, type_name, active, group)
        add_rates([r], rate, about["l2_bytes"], about["name"])
        right &= r["right"]
        tell(f"smoke experts {type_name}", r, f"experts {type_name}, {active} of {geometry[0]}: {_verdict(r)} "
             f"(error {r['error']:.1e}), {1e3 * r['ms']:.1f} us, {r['bytes_per_second'] / 1e12:.2f} TB/s, "
             f"{r['of_copy']:.0%} of the copy{_beside(r)}")
    r = smoke_route(device, stream, library, ROOT / "tests" / "golden" / "llada2_dmoe")
    tell("smoke route", r, f"route a block of {r['tokens']} over {r['experts']}: {_verdict(r)}, "
                           f"{1e3 * r['ms']:.1f} us{_beside(r)}")
    return right and r["right"]


def _verdict(r: dict[str, Any]) -> str:
    return "right" if r["right"] else "WRONG"


def _beside(r: dict[str, Any]) -> str:
    return "; " + said(1e3 * r["ms"], tuple(r["predicted"]), "us") if "predicted" in r else ""


def _tell(folder: Path, start: float, name: str, value: Any, words: str) -> None:
    append_finding(folder, name, value)
    print(f"{time.perf_counter() - start:5.1f} s  {words}", flush=True)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON lines [benchmarks/results]")
    options = parser.parse_args()
    start = time.perf_counter()
    require_gpu()
    from dmoe_export.runtime.gpu.device import CudaDevice

    tell = partial(_tell, options.out, start)
    if not run(CudaDevice.open(), KernelLibrary(LIBRARY), tell, GEOMETRIES["mini"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
