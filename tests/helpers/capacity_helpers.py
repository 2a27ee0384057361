"""One-node models of the experts op with its capacity body, and their TensorRT-RTX engines."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dmoe_export.ops.experts import SCHEMA, Activation, activation_attribute
from dmoe_export.ops.experts.onnx_capacity import experts_capacity_body
from dmoe_export.ops.schema import DOMAIN, OPSET


def capacity_model(experts: int, k: int, hidden: int, width: int, capacity: int, elem: int = TensorProto.FLOAT,
                   weights: tuple[np.ndarray, np.ndarray] | None = None, routed: bool = False,
                   activation: Activation = "silu") -> onnx.ModelProto:
    """The op alone. Expert weights are initializers if given, otherwise inputs (of any number of slabs).

    `routed` adds a TopK in front: ids and weights are then computed on the device from `scores [N, E]`.
    """
    value = helper.make_tensor_value_info
    inputs, nodes, initializers = [value("hidden", elem, ["N", hidden])], [], []
    if routed:
        inputs.append(value("scores", TensorProto.FLOAT, ["N", experts]))
        initializers.append(numpy_helper.from_array(np.int64([k]), "k"))
        nodes = [helper.make_node("TopK", ["scores", "k"], ["expert_weights", "ids"]),
                 helper.make_node("Cast", ["ids"], ["expert_ids"], to=TensorProto.INT32)]
    else:
        inputs += [value("expert_ids", TensorProto.INT32, ["N", k]),
                   value("expert_weights", TensorProto.FLOAT, ["N", k])]
    if weights:
        initializers += map(numpy_helper.from_array, weights, ("gate_up", "down"))
    else:
        inputs += [value("gate_up", elem, ["slabs", 2 * width, hidden]), value("down", elem, ["slabs", hidden, width])]
    # No plugin attributes, as engine/network.py leaves them out: a plugin that is registered must not be taken.
    nodes.append(helper.make_node(SCHEMA.name, SCHEMA.inputs, SCHEMA.outputs, domain=DOMAIN,
                                  **activation_attribute(activation)))
    graph = helper.make_graph(nodes, "experts", inputs, [value("mixed", elem, ["N", hidden])], initializers)
    body = experts_capacity_body(experts, elem, capacity, activation)
    model = helper.make_model(graph, functions=[body], ir_version=10,
                              opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)])
    onnx.checker.check_model(model, full_check=True)
    return model


def build_rtx(model: onnx.ModelProto, slabs: int, tokens: list[tuple[int, int, int]]) -> tuple[int, int]:
    """Build for SM89, one profile per (least, best, most) tokens: engine bytes, loops in the network.

    Skips where TensorRT-RTX is not installed. Needs no GPU and does not run the engine.
    """
    bindings = pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")
    trt = getattr(bindings, "tensorrt_rtx_bindings", bindings)
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(model.SerializeToString()), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)  # never CURRENT: it needs a GPU
    for sizes in tokens:
        profile = builder.create_optimization_profile()
        for entry in (network.get_input(i) for i in range(network.num_inputs)):
            first = (slabs,) * 3 if entry.name in ("gate_up", "down") else sizes
            profile.set_shape(entry.name, *[(n, *tuple(entry.shape)[1:]) for n in first])
        config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    assert engine is not None, "the build failed; see the log above"
    kinds = [network.get_layer(i).type for i in range(network.num_layers)]
    return engine.nbytes, kinds.count(trt.LayerType.LOOP_OUTPUT)
