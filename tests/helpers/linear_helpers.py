"""Cases of linear layers for the CPU kernels, against float64; run as a program it checks one instruction set.

    DMOE_CPU_ISA=avx2 python tests/helpers/linear_helpers.py LIBRARY
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

from dmoe_export.ops.linear import SCHEMA
from dmoe_export.ops.schema import DOMAIN, OPSET

KINDS: dict[str, tuple[TensorProto.DataType, type, float]] = {  # with the rounding of a result
    "float": (TensorProto.FLOAT, np.float32, 0), "half": (TensorProto.FLOAT16, np.float16, 2**-11)}
TOLERANCE = 1e-6  # of Σ |x · w|, beyond that rounding: sums of some thousand products in float32, in any order


def linear_model(bias: bool, kind: str = "float") -> bytes:
    """One node whose weights are inputs."""
    names, elem = ["x", "w", *(["b"] if bias else [])], KINDS[kind][0]
    graph = helper.make_graph([helper.make_node(SCHEMA.name, names, ["y"], domain=DOMAIN)], "one",
                              [helper.make_tensor_value_info(name, elem, None) for name in names],
                              [helper.make_tensor_value_info("y", elem, None)])
    return helper.make_model(graph, ir_version=10, opset_imports=[
        helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]).SerializeToString()


@cache
def session(library: Path, bias: bool, kind: str) -> ort.InferenceSession:
    """A session of that node with two threads."""
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 2
    options.register_custom_ops_library(str(library))
    return ort.InferenceSession(linear_model(bias, kind), options, providers=["CPUExecutionProvider"])


def case(tokens: int, columns: int, rows: int, bias: bool = False, seed: int = 0,
         kind: str = "float") -> dict[str, np.ndarray]:
    """Random inputs."""
    rng = np.random.default_rng(seed)
    feeds = {"x": rng.normal(size=(tokens, columns)), "w": rng.normal(size=(rows, columns))}
    if bias:
        feeds["b"] = rng.normal(size=rows)
    return {name: value.astype(KINDS[kind][1]) for name, value in feeds.items()}


def run(library: Path, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """y [tokens, rows]."""
    kind = "half" if feeds["x"].dtype == np.float16 else "float"
    return session(library, "b" in feeds, kind).run(None, feeds)[0]


def error(library: Path, feeds: dict[str, np.ndarray]) -> float:
    """Largest difference to the same in float64 beyond a result's rounding, of the sum of its products' sizes."""
    exact = {name: value.astype(np.float64) for name, value in feeds.items()}
    x, w, bias = exact["x"], exact["w"], exact.get("b", np.zeros(1))
    want, size = x @ w.T + bias, np.abs(x) @ np.abs(w.T) + np.abs(bias)
    got = run(library, feeds)
    assert got.shape == want.shape
    rounding = next(unit for _, dtype, unit in KINDS.values() if dtype == got.dtype) * (np.abs(want) + 2**-14)
    return float(((np.abs(got - want) - rounding) / size).max(initial=0))


if __name__ == "__main__":
    for sizes in [(1, 64, 40), (4, 2048, 7), (8, 130, 121), (9, 33, 240), (16, 256, 122), (17, 100, 41),
                  (32, 2048, 360), (33, 67, 130), (49, 1024, 25), (130, 70, 123)]:
        for name in KINDS:
            found = error(Path(sys.argv[1]), case(*sizes, bias=sizes[0] % 2 == 1, kind=name))
            assert found < TOLERANCE, f"{name} {sizes}: {found}"
