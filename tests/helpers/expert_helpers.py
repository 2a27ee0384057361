"""A one-node model of the experts op, weights as external data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from linear_helpers import elem_type
from onnx import TensorProto, helper

from dmoe_export.ops.experts import SCHEMA
from dmoe_export.ops.experts.onnx_body import experts_body
from dmoe_export.ops.schema import DOMAIN, OPSET


def write_expert_model(folder: Path, experts: int, k: int, hidden: int, width: int, dtype=np.float32,
                       weights: tuple[np.ndarray, np.ndarray] | None = None, stored=None) -> Path:
    """Write model and weight file, the weights as `stored` (default: as `dtype`).

    Without `weights` the file holds repeated random slabs (written piecemeal).
    """
    elem = TensorProto.FLOAT if dtype == np.float32 else TensorProto.FLOAT16
    stored = stored or dtype
    rng = np.random.default_rng(0)
    item, offset, tensors = np.dtype(stored).itemsize, 0, []
    with (folder / "experts.bin").open("wb") as file:
        for index, (name, shape) in enumerate((("gate_up", (experts, 2 * width, hidden)),
                                               ("down", (experts, hidden, width)))):
            tensor = TensorProto(name=name, data_type=elem_type(stored), dims=shape, data_location=TensorProto.EXTERNAL)
            length = int(np.prod(shape)) * item
            for key, value in (("location", "experts.bin"), ("offset", offset), ("length", length)):
                tensor.external_data.add(key=key, value=str(value))
            if weights:
                file.write(weights[index].astype(stored).tobytes())
            else:
                slab = (rng.normal(size=shape[1:]) * 0.02).astype(stored).tobytes()
                for _ in range(experts):
                    file.write(slab)
            offset += length
            tensors.append(tensor)
    node = helper.make_node(SCHEMA.name, SCHEMA.inputs, SCHEMA.outputs, domain=DOMAIN, **SCHEMA.plugin_attributes)
    graph = helper.make_graph(
        [node], "experts",
        [helper.make_tensor_value_info("hidden", elem, ["N", hidden]),
         helper.make_tensor_value_info("expert_ids", TensorProto.INT32, ["N", k]),
         helper.make_tensor_value_info("expert_weights", TensorProto.FLOAT, ["N", k])],
        [helper.make_tensor_value_info("mixed", elem, ["N", hidden])], initializer=tensors)
    body = experts_body(experts, k, hidden, elem, narrow=stored != dtype)
    model = helper.make_model(graph, functions=[body], ir_version=10,
                              opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1),
                                             helper.make_opsetid("com.microsoft", 1)])
    path = folder / "experts.onnx"
    path.write_bytes(model.SerializeToString())
    onnx.checker.check_model(str(path), full_check=True)
    return path
