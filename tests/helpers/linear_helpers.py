"""Cases of linear layers for the CPU kernels, against float64; run as a program it checks one instruction set.

    DMOE_CPU_ISA=avx2 python tests/helpers/linear_helpers.py LIBRARY
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper

from dmoe_export.ops.experts.quantised import dequantise, quantise
from dmoe_export.ops.linear import QUANTISED_SCHEMA, SCHEMA
from dmoe_export.ops.schema import DOMAIN, OPSET
from dmoe_export.weight_formats import ExpertQuantisation

TOLERANCE = 1e-6  # of Σ |x · w|, beyond a result's rounding: sums of some thousand products in float32, in any order
ROUNDING = {np.float32: 0.0, np.float16: 2**-11}


class Kind(NamedTuple):
    """Types of x, scales, b and y, and of w; bits of quantised weights."""

    values: type
    weights: type
    bits: int = 0


KINDS = {"float": Kind(np.float32, np.float32), "half": Kind(np.float16, np.float16),
         "half weights": Kind(np.float32, np.float16), "bfloat weights": Kind(np.float32, ml_dtypes.bfloat16)}
QUANTISED = {"int8": Kind(np.float32, np.uint8, 8), "int4": Kind(np.float32, np.uint8, 4),
             "int8 half": Kind(np.float16, np.uint8, 8), "int4 half": Kind(np.float16, np.uint8, 4)}
ALL = KINDS | QUANTISED


def linear_model(bias: bool, kind: str = "float", group: int = 32) -> bytes:
    """One node whose weights are inputs."""
    values, weights, _ = ALL[kind]
    node = linear_node(bias, kind, group=group)
    types = {name: elem_type(weights if name == "w" else values) for name in node.input}
    graph = helper.make_graph([node], "one",
                              [helper.make_tensor_value_info(name, elem, None) for name, elem in types.items()],
                              [helper.make_tensor_value_info("y", elem_type(values), None)])
    return helper.make_model(graph, ir_version=10, opset_imports=[
        helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]).SerializeToString()


def linear_node(bias: bool, kind: str, rows: int = 0, columns: int = 0, group: int = 32) -> onnx.NodeProto:
    """The node, with the inputs' names of the schema; rows and columns are for the body of the quantised one."""
    bits = ALL[kind].bits
    schema = QUANTISED_SCHEMA if bits else SCHEMA
    attributes = {"bits": bits, "group_size": group, "in_features": columns, "out_features": rows} if bits else {}
    names = schema.inputs if bias else schema.inputs[:-1]
    return helper.make_node(schema.name, names, schema.outputs, domain=DOMAIN, **attributes)


def elem_type(dtype: type) -> TensorProto.DataType:
    """The tensor type of a numpy type."""
    return TensorProto.BFLOAT16 if dtype == ml_dtypes.bfloat16 else helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


@cache
def session(library: Path, bias: bool, kind: str, group: int = 32) -> ort.InferenceSession:
    """A session of that node with two threads."""
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 2
    options.register_custom_ops_library(str(library))
    return ort.InferenceSession(linear_model(bias, kind, group), options, providers=["CPUExecutionProvider"])


def case(tokens: int, columns: int, rows: int, bias: bool = False, seed: int = 0, kind: str = "float",
         group: int = 32) -> dict[str, np.ndarray]:
    """Random inputs."""
    rng, (values, weights, bits) = np.random.default_rng(seed), ALL[kind]
    x, w = rng.normal(size=(tokens, columns)).astype(values), rng.normal(size=(rows, columns))
    feeds = {"x": x} | ({"b": rng.normal(size=rows).astype(values)} if bias else {})
    if not bits:
        return feeds | {"w": w.astype(weights)}
    packed, scales = quantise(torch.from_numpy(w), ExpertQuantisation(bits=bits, group_size=group),
                              torch.float16 if values == np.float16 else torch.float32)
    return feeds | {"w": packed.numpy(), "scales": scales.numpy()}


def on_onnxruntime(value: np.ndarray) -> Any:
    """An OrtValue, also of the type that numpy does not have."""
    if value.dtype == ml_dtypes.bfloat16:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(value.view(np.uint16), TensorProto.BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(value)


def run(library: Path, feeds: dict[str, np.ndarray], kind: str = "float", group: int = 32) -> np.ndarray:
    """y [tokens, rows]."""
    values = {name: on_onnxruntime(value) for name, value in feeds.items()}
    return session(library, "b" in feeds, kind, group).run_with_ort_values(None, values)[0].numpy()


def error(library: Path, feeds: dict[str, np.ndarray], kind: str = "float", group: int = 32) -> float:
    """Largest difference to the same in float64 beyond a result's rounding, of the sum of its products' sizes."""
    exact = {name: value.astype(np.float64) for name, value in feeds.items()}
    if ALL[kind].bits:
        scales = torch.from_numpy(feeds["scales"])
        exact["w"] = dequantise(torch.from_numpy(feeds["w"]), scales, ALL[kind].bits).numpy().astype(np.float64)
    x, w, bias = exact["x"], exact["w"], exact.get("b", np.zeros(1))
    want, size = x @ w.T + bias, np.abs(x) @ np.abs(w.T) + np.abs(bias)
    got = run(library, feeds, kind, group)
    assert got.shape == want.shape and got.dtype == ALL[kind].values
    rounding = ROUNDING[ALL[kind].values] * (np.abs(want) + 2**-14)
    return float(((np.abs(got - want) - rounding) / size).max(initial=0))


if __name__ == "__main__":
    for sizes in [(1, 64, 40), (4, 2048, 7), (8, 130, 121), (9, 33, 240), (16, 256, 122), (17, 100, 41),
                  (32, 2048, 360), (33, 67, 130), (49, 1024, 25), (130, 70, 123)]:
        for name in ALL:
            fitting = (sizes[0], -(-sizes[1] // 32) * 32, sizes[2]) if name in QUANTISED else sizes
            found = error(Path(sys.argv[1]), case(*fitting, bias=sizes[0] % 2 == 1, kind=name), name)
            assert found < TOLERANCE, f"{name} {sizes}: {found}"
    for name in ALL:  # one order of sums, whatever the number of tokens
        feeds = case(70, 160, 43, kind=name)
        want = run(Path(sys.argv[1]), feeds, name)
        for tokens in (1, 4, 5, 8, 9, 12, 13, 16, 17, 33, 65):
            got = run(Path(sys.argv[1]), feeds | {"x": feeds["x"][:tokens].copy()}, name)
            assert (got == want[:tokens]).all(), f"{name} with {tokens} tokens"
