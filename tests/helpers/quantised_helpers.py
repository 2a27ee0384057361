"""A one-node model of the experts op with quantised experts, weights as external data; quantisation in plain numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from dmoe_export.ops.experts import QUANTISED_SCHEMA
from dmoe_export.ops.experts.onnx_body import experts_body
from dmoe_export.ops.schema import DOMAIN, OPSET
from dmoe_export.weight_formats import ExpertQuantisation

NAMES = ("gate_up", "down", "gate_up_scales", "down_scales")


def shapes_of(experts: int, hidden: int, width: int, how: ExpertQuantisation) -> dict[str, tuple[int, int, int]]:
    """Shapes of the four weight inputs."""
    rows = {"gate_up": (2 * width, hidden), "down": (hidden, width)}
    packed = {name: (experts, r, c * how.bits // 8) for name, (r, c) in rows.items()}
    return packed | {f"{name}_scales": (experts, r, c // how.group_size) for name, (r, c) in rows.items()}


def values(packed: np.ndarray, scales: np.ndarray, bits: int) -> np.ndarray:
    """What stored bytes mean, in float64; written after docs/bundle.md, one byte at a time."""
    flat = []
    for byte in packed.reshape(-1).tolist():
        flat += [byte - 128] if bits == 8 else [(byte % 16) - 8, (byte // 16) - 8]
    group = len(flat) // scales.size
    return (np.array(flat, float) * np.repeat(scales.reshape(-1).astype(float), group)).reshape(
        *packed.shape[:-1], packed.shape[-1] * 8 // bits)


def write_quantised_model(folder: Path, k: int, hidden: int, width: int, how: ExpertQuantisation,
                          weights: dict[str, np.ndarray], experts: int) -> Path:
    """Write model and weight file; weights of one expert ([1, …]) are repeated."""
    shapes = shapes_of(experts, hidden, width, how)
    elem = helper.np_dtype_to_tensor_dtype(weights["down_scales"].dtype)
    tensors, offset = [], 0
    with (folder / "experts.bin").open("wb") as file:
        for name in NAMES:
            array = weights[name]
            for _ in range(experts // len(array)):
                file.write(array.tobytes())
            length = array.nbytes * (experts // len(array))
            tensor = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(array.dtype), dims=shapes[name],
                                 data_location=TensorProto.EXTERNAL)
            for key, value in (("location", "experts.bin"), ("offset", offset), ("length", length)):
                tensor.external_data.add(key=key, value=str(value))
            offset += length + -length % 4096
            file.write(bytes(-length % 4096))
            tensors.append(tensor)
    node = helper.make_node("DmoeExperts", QUANTISED_SCHEMA.inputs, QUANTISED_SCHEMA.outputs, domain=DOMAIN,
                            **QUANTISED_SCHEMA.plugin_attributes, **how.model_dump())
    graph = helper.make_graph(
        [node], "experts",
        [helper.make_tensor_value_info("hidden", elem, ["N", hidden]),
         helper.make_tensor_value_info("expert_ids", TensorProto.INT32, ["N", k]),
         helper.make_tensor_value_info("expert_weights", TensorProto.FLOAT, ["N", k])],
        [helper.make_tensor_value_info("mixed", elem, ["N", hidden])], initializer=tensors)
    model = helper.make_model(graph, functions=[experts_body(experts, k, hidden, elem, how, width)], ir_version=10,
                              opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1),
                                             helper.make_opsetid("com.microsoft", 1)])
    path = folder / "experts.onnx"
    path.write_bytes(model.SerializeToString())
    onnx.checker.check_model(str(path), full_check=True)
    return path
