"""Fast products of the CPU kernels against float64 products of activations rounded as they promise; run as a program it
checks one instruction set.

    DMOE_CPU_ISA=avx2 python tests/helpers/fast_helpers.py LIBRARY
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from pathlib import Path

import cpu_ops_helpers
import linear_helpers
import ml_dtypes
import numpy as np
import onnxruntime as ort
import torch
from linear_helpers import ALL, on_onnxruntime

from dmoe_export.ops.experts import Activation, activation_attribute
from dmoe_export.ops.experts.eager import activate
from dmoe_export.ops.experts.quantised import dequantise
from dmoe_export.runtime.library import LibrarySession

EXACT = "float32"
FORMATS = ["float", "half", "int8", "int4", "bfloat"]  # by number, as dmoe_cpu_products has them
TOLERANCE = linear_helpers.TOLERANCE  # of Σ |x · w|
FLIPPED = 5e-3  # of the largest output: a value between two products that was rounded to the next integer
LINEAR = ["int8", "int4", "int8 half", "int4 half", "bfloat weights"]  # kinds of linear_helpers.ALL
SIZES = [(1, 64, 40), (2, 2048, 7), (3, 96, 33), (4, 160, 9), (5, 32, 14), (7, 192, 50), (12, 130, 30), (13, 67, 25),
         (17, 96, 41), (33, 2048, 50), (64, 160, 13), (70, 97, 24)]
EXPERTS = ["int8", "int4", "int8 half", "int4 half", "bfloat weights"]  # of cpu_ops_helpers.FORMATS


def products(library: Path, format: str, fast: bool = True) -> str:
    """What products of such weights run on."""
    name = ctypes.CDLL(str(library)).dmoe_cpu_products
    name.restype = ctypes.c_char_p
    return name(FORMATS.index(format) if format in FORMATS else -1, int(fast)).decode()


def stored(kind: str) -> str:
    """The format of a kind's weights."""
    return kind.split()[0]


@cache
def _session(library: Path, model: bytes) -> tuple[ort.InferenceSession, LibrarySession]:
    options, kernels = ort.SessionOptions(), LibrarySession(library)
    options.log_severity_level, options.intra_op_num_threads = 4, 2
    kernels.register(options)
    ctypes.CDLL(str(library)).dmoe_session_set_products(ctypes.c_void_p(kernels._address), ctypes.c_int32(1))
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"]), kernels


def run(library: Path, model: bytes, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """The only output of a one-node model, with fast products."""
    values = {name: on_onnxruntime(value) for name, value in feeds.items()}
    return _session(library, model)[0].run_with_ort_values(None, values)[0].numpy()


def linear(library: Path, kind: str, feeds: dict[str, np.ndarray], group: int = 32) -> np.ndarray:
    """y [tokens, rows]."""
    return run(library, linear_helpers.linear_model("b" in feeds, kind, group), feeds)


def experts(library: Path, kind: str, feeds: dict[str, np.ndarray], group: int = 32,
            activation: Activation = "silu") -> np.ndarray:
    """The mixed output [N, H]."""
    return run(library, cpu_ops_helpers.model(kind, group, **activation_attribute(activation)), feeds)


def narrowed(x: np.ndarray, name: str, group: int) -> np.ndarray:
    """x [tokens, K] as products of this name see it, in float64."""
    x = x.astype(np.float32)
    if name == EXACT:
        return x.astype(np.float64)
    if "int8" not in name:
        return x.astype(ml_dtypes.bfloat16).astype(np.float64)
    parts = x.reshape(len(x), -1, group)
    largest = np.maximum(np.abs(parts).max(-1, keepdims=True), np.float32(2.0**-100))
    q = np.rint(parts * (np.float32(127) / largest))
    return (q.astype(np.float64) * (largest / np.float32(127))).reshape(x.shape)


def weights(feeds: dict[str, np.ndarray], name: str, bits: int) -> np.ndarray:
    """A matrix in float64."""
    if not bits:
        return feeds[name].astype(np.float64)
    scales = torch.from_numpy(feeds["scales" if name == "w" else f"{name}_scales"].astype(np.float32))
    return dequantise(torch.from_numpy(feeds[name]), scales, bits).numpy().astype(np.float64)


def linear_error(library: Path, kind: str, feeds: dict[str, np.ndarray], group: int = 32) -> float:
    """Largest difference beyond a result's rounding, of the sum of its products' sizes."""
    x = narrowed(feeds["x"], products(library, stored(kind)), group)
    w, bias = weights(feeds, "w", ALL[kind].bits), feeds.get("b", np.zeros(1)).astype(np.float64)
    want, size = x @ w.T + bias, np.abs(x) @ np.abs(w.T) + np.abs(bias)
    got = linear(library, kind, feeds, group)
    rounding = linear_helpers.ROUNDING[ALL[kind].values] * (np.abs(want) + 2**-14)
    return float(((np.abs(got - want) - rounding) / size).max(initial=0))


def experts_errors(library: Path, kind: str, feeds: dict[str, np.ndarray], group: int = 32,
                   activation: Activation = "silu") -> tuple[float, float]:
    """Differences of the largest output: the nine of ten that are smaller, and all."""
    bits, name = cpu_ops_helpers.FORMATS[kind][0], products(library, stored(kind))
    gate_up, down = weights(feeds, "gate_up", bits), weights(feeds, "down", bits)
    x, want = narrowed(feeds["hidden"], name, group), np.zeros(feeds["hidden"].shape)
    for token, ids in enumerate(feeds["expert_ids"]):
        for place, expert in enumerate(ids):
            if expert >= 0:
                both = (gate_up[expert] @ x[token]).astype(np.float32).astype(np.float64)
                gate, up = both[::2], both[1::2]
                acted = activate(torch.from_numpy(gate), activation).numpy() * up
                activated = narrowed(acted[None], name, group)[0]
                want[token] += feeds["expert_weights"][token, place] * (down[expert] @ activated)
    got = experts(library, kind, feeds, group, activation).astype(np.float64)
    assert got.shape == want.shape
    errors = np.abs(got - want) / max(np.abs(want).max(initial=0), 1e-3)
    return float(np.quantile(errors, 0.9)), float(errors.max(initial=0))


def check_experts(library: Path, kind: str, feeds: dict[str, np.ndarray], group: int = 32,
                  activation: Activation = "silu") -> None:
    """Within the tolerances."""
    half = 1e-3 if cpu_ops_helpers.FORMATS[kind][1] == np.float16 else 0
    most, largest = experts_errors(library, kind, feeds, group, activation)
    assert most < 2e-6 * 50 + half and largest < FLIPPED + half, (kind, most, largest)


def main() -> None:
    """Sizes that meet every tile and tail; prints the products."""
    library = Path(sys.argv[1])
    for kind in LINEAR:
        for tokens, columns, rows in SIZES:
            for group in (32, 64, 128) if "int" in kind else (1,):
                whole = -(-columns // group) * group
                feeds = linear_helpers.case(tokens, whole, rows, tokens % 2 == 1, tokens, kind, group)
                found = linear_error(library, kind, feeds, group)
                assert found < TOLERANCE, (kind, tokens, whole, rows, group, found)
        print(kind, products(library, stored(kind)))
    for kind in EXPERTS:
        for tokens in (1, 9, 45):
            check_experts(library, kind, cpu_ops_helpers.case(kind, tokens, 2, 3, 96, 160, seed=tokens))


if __name__ == "__main__":
    main()
