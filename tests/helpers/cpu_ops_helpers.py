"""Cases of the experts op for the CPU kernels, against the eager op; run as a program it checks one instruction set.

    DMOE_CPU_ISA=avx2 python tests/helpers/cpu_ops_helpers.py LIBRARY
"""

from __future__ import annotations

import os
import shutil
import sys
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, get_args

import ml_dtypes
import numpy as np
import onnxruntime as ort
import pytest
import torch
from builds import build
from linear_helpers import on_onnxruntime
from onnx import TensorProto, helper

from dmoe_export.ops.experts import QUANTISED_SCHEMA, Activation, activation_attribute
from dmoe_export.ops.experts.eager import experts
from dmoe_export.ops.experts.quantised import quantise
from dmoe_export.ops.schema import DOMAIN, OPSET
from dmoe_export.weight_formats import ExpertQuantisation

ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
FORMATS: dict[str, tuple[int, type]] = {
    "float": (0, np.float32), "half": (0, np.float16), "half weights": (0, np.float32),
    "bfloat weights": (0, np.float32), "int8": (8, np.float32), "int4": (4, np.float32), "int8 half": (8, np.float16),
    "int4 half": (4, np.float16)}
_NARROW = {"half weights": np.float16, "bfloat weights": ml_dtypes.bfloat16}  # than the values
TOLERANCE = {name: 2e-6 if dtype == np.float32 else 2e-3 for name, (_, dtype) in FORMATS.items()}  # of the largest


@cache
def built() -> Path:
    """The library of these sources, of one test worker for all; skips without a compiler, but never in CI.

    DMOE_CPU_PRESET is another preset of plugins/CMakePresets.json (cpu-sanitized, by `make sanitize`).
    """
    if not (shutil.which(os.environ.get("CXX", "c++")) or os.environ.get("CI")):
        pytest.skip("there is no C++ compiler")
    return build(os.environ.get("DMOE_CPU_PRESET", "cpu")) / "libdmoe_cpu.so"


def model(kind: str, group: int = 32, **attributes: Any) -> bytes:
    """One node whose weights are inputs."""
    bits, dtype = FORMATS[kind]
    elem = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    stored = TensorProto.UINT8 if bits else elem
    if kind in _NARROW:
        stored = TensorProto.BFLOAT16 if kind == "bfloat weights" else TensorProto.FLOAT16
    kinds = [elem, TensorProto.INT32, TensorProto.FLOAT, stored, stored, *([elem, elem] if bits else [])]
    names = QUANTISED_SCHEMA.inputs[:len(kinds)]
    attributes |= {"bits": bits, "group_size": group} if bits else {}
    node = helper.make_node("DmoeExperts", names, ["mixed"], domain=DOMAIN, **attributes)
    graph = helper.make_graph([node], "one", [helper.make_tensor_value_info(*pair, None)
                                              for pair in zip(names, kinds, strict=True)],
                              [helper.make_tensor_value_info("mixed", elem, None)])
    return helper.make_model(graph, ir_version=10, opset_imports=[
        helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]).SerializeToString()


@cache
def session(library: Path, kind: str, group: int = 32, **attributes: Any) -> ort.InferenceSession:
    """A session of that node with two threads."""
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 2
    options.register_custom_ops_library(str(library))
    return ort.InferenceSession(model(kind, group, **attributes), options, providers=["CPUExecutionProvider"])


def case(kind: str, tokens: int, k: int, count: int, hidden: int, width: int, group: int = 32,
         seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs; a fifth of the places have no expert."""
    rng, (bits, dtype) = np.random.default_rng(seed), FORMATS[kind]
    ids = np.array([rng.permutation(count)[:k] for _ in range(tokens)], np.int32).reshape(tokens, k)
    ids[rng.random(ids.shape) < 0.2] = -1
    matrices = {"gate_up": rng.normal(size=(count, 2 * width, hidden)) * hidden**-0.5,
                "down": rng.normal(size=(count, hidden, width)) * width**-0.5}
    feeds: dict[str, np.ndarray] = {"hidden": rng.normal(size=(tokens, hidden)).astype(dtype), "expert_ids": ids,
                                    "expert_weights": rng.random((tokens, k)).astype(np.float32) * 3}
    if not bits:
        return feeds | {name: matrix.astype(_NARROW.get(kind, dtype)) for name, matrix in matrices.items()}
    how = ExpertQuantisation(bits=bits, group_size=group)
    scales = torch.float16 if dtype == np.float16 else torch.float32
    made = {name: quantise(torch.from_numpy(m), how, scales) for name, m in matrices.items()}
    return (feeds | {name: packed.numpy() for name, (packed, _) in made.items()}
            | {f"{name}_scales": s.numpy() for name, (_, s) in made.items()})


def eager(feeds: dict[str, np.ndarray], activation: Activation = "silu") -> np.ndarray:
    """The eager op on the same arrays; halves in float32, as our kernel computes."""
    wide = {np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)}
    given = [feeds[name] for name in QUANTISED_SCHEMA.inputs if name in feeds]
    tensors = (torch.from_numpy(x.astype(np.float32) if x.dtype in wide else x) for x in given)
    return experts(*tensors, activation=activation).numpy()


def run(library: Path, kind: str, feeds: dict[str, np.ndarray], group: int = 32,
        activation: Activation = "silu") -> np.ndarray:
    """The mixed output [N, H]."""
    values = {name: on_onnxruntime(value) for name, value in feeds.items()}
    one = session(library, kind, group, **activation_attribute(activation))
    return one.run_with_ort_values(None, values)[0].numpy()


def error(library: Path, kind: str, feeds: dict[str, np.ndarray], group: int = 32,
          activation: Activation = "silu") -> float:
    """Largest difference to the eager op, of its largest output."""
    got, want = run(library, kind, feeds, group, activation).astype(np.float32), eager(feeds, activation)
    assert got.shape == want.shape
    return float(np.abs(got - want).max(initial=0) / max(np.abs(want).max(initial=0), 1e-3))


def main() -> None:
    """Check sizes that meet every tile and tail; prints the largest error of each format."""
    library = Path(sys.argv[1])
    for kind, activation in product(FORMATS, ACTIVATIONS):
        bits, errors = FORMATS[kind][0], []
        sizes = ((32, 32), (96, 64), (64, 160)) if bits else ((32, 24), (44, 7), (130, 65))
        for tokens in (1, 2, 3, 4, 5, 6, 7, 13, 45) if activation == "silu" else (3, 45):
            for hidden, width in sizes:
                feeds = case(kind, tokens, 2, 3, hidden, width, seed=tokens)
                errors.append(error(library, kind, feeds, activation=activation))
        assert max(errors) < TOLERANCE[kind], (kind, activation, max(errors))
        print(kind, activation, max(errors))


if __name__ == "__main__":
    main()
