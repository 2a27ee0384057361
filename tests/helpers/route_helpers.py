"""One way to call each implementation of block routing on numpy arrays."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx
import onnxruntime as ort
import torch
from kernel_helpers import kernel_route
from onnx import TensorProto, helper

from dmoe_export.ops.block_route import SCHEMA
from dmoe_export.ops.block_route.attributes import RouteAttributes
from dmoe_export.ops.block_route.eager import block_route
from dmoe_export.ops.block_route.onnx_body import block_route_body
from dmoe_export.ops.schema import DOMAIN, OPSET


def eager_route(attributes, logits, bias, positions, top_p=0.6, min_experts=1, coreset_size=8):
    inputs = (logits.astype(np.float32), bias.astype(np.float32), positions.astype(np.int64),
              np.float32([top_p]), np.int64([min_experts]), np.int64([coreset_size]))
    return tuple(x.numpy() for x in block_route(*map(torch.from_numpy, inputs), attributes))


@cache
def _session(attributes: RouteAttributes, experts: int) -> ort.InferenceSession:
    kinds = [TensorProto.FLOAT, TensorProto.FLOAT, TensorProto.INT64, TensorProto.FLOAT, TensorProto.INT64,
             TensorProto.INT64]
    shapes = [["B", "T", experts], [experts], ["B", "T"], [1], [1], [1]]
    k = attributes.experts_per_token
    node = helper.make_node(SCHEMA.name, SCHEMA.inputs, SCHEMA.outputs, domain=DOMAIN, **attributes.node_attributes())
    graph = helper.make_graph(
        [node], "route", [helper.make_tensor_value_info(*x) for x in zip(SCHEMA.inputs, kinds, shapes, strict=True)],
        [helper.make_tensor_value_info("expert_ids", TensorProto.INT32, ["B", "T", k]),
         helper.make_tensor_value_info("expert_weights", TensorProto.FLOAT, ["B", "T", k]),
         helper.make_tensor_value_info("coreset", TensorProto.BOOL, ["B", "T", experts])])
    model = helper.make_model(graph, functions=[block_route_body(attributes, experts)], ir_version=10,
                              opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)])
    onnx.checker.check_model(model, full_check=True)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def onnx_route(attributes, logits, bias, positions, top_p=0.6, min_experts=1, coreset_size=8):
    feeds = dict(zip(SCHEMA.inputs, (
        logits.astype(np.float32), bias.astype(np.float32), positions.astype(np.int64), np.float32([top_p]),
        np.int64([min_experts]), np.int64([coreset_size])), strict=True))
    session = _session(attributes, logits.shape[-1])
    return session.run(None, {i.name: feeds[i.name] for i in session.get_inputs()})


IMPLEMENTATIONS = {"eager": eager_route, "onnx": onnx_route, "kernel": kernel_route}
