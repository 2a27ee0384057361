"""The custom-op library for the CPU provider (adapters on the emulated kernels) and models of one custom node."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime as ort
from builds import build
from onnx import TensorProto, helper

from dmoe_export.ops import block_route, experts
from dmoe_export.ops.experts.fragments import scales_in_fragments, weights_in_fragments
from dmoe_export.ops.schema import DOMAIN, OPSET
from dmoe_export.runtime.library import LibrarySession

CPU = "CPUExecutionProvider"


@cache
def library() -> Path:
    """Builds it; DMOE_ORT_OPS_CPU names another build."""
    named = os.environ.get("DMOE_ORT_OPS_CPU")
    return Path(named) if named else build("emulation") / "libdmoe_onnxruntime_cpu.so"


def session(model: bytes, custom_ops: Path | None = None, provider: str = CPU,
            layout: int | None = None) -> ort.InferenceSession:
    """A session with the library for the CPU provider, or another one; `layout`: that of quantised experts."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if layout is None:
        options.register_custom_ops_library(str(custom_ops or library()))
    else:
        kernels = LibrarySession(custom_ops or library())
        kernels.set_experts_layout(layout)
        kernels.register(options)
    return ort.InferenceSession(model, options, providers=[provider])


def _model(nodes, inputs, outputs) -> bytes:
    graph = helper.make_graph(nodes, "one_node", [helper.make_tensor_value_info(*x) for x in inputs],
                              [helper.make_tensor_value_info(*x) for x in outputs])
    return helper.make_model(graph, ir_version=10, opset_imports=[
        helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]).SerializeToString()


def route_model(attributes: dict, with_coreset: bool = True) -> bytes:
    """Sizes are not said, so that wrong ones reach the op."""
    schema, i64, f32 = block_route.SCHEMA, TensorProto.INT64, TensorProto.FLOAT
    outputs = schema.outputs if with_coreset else (*schema.outputs[:2], "")
    node = helper.make_node(schema.name, schema.inputs, outputs, domain=DOMAIN, **attributes)
    kinds = zip(schema.outputs, (TensorProto.INT32, f32, TensorProto.BOOL), strict=True)
    return _model([node], [(name, kind, None) for name, kind in
                           zip(schema.inputs, (f32, f32, i64, f32, i64, i64), strict=True)],
                  [(name, kind, None) for name, kind in kinds if name in outputs])


def experts_model(half: int) -> bytes:
    """Inputs and output are float32 and cast to and from `half`, because numpy has no bf16; half FLOAT: no casts."""
    schema, nodes, names = experts.SCHEMA, [], []
    for name in schema.inputs:
        cast = name in ("hidden", "gate_up", "down") and half != TensorProto.FLOAT
        if cast:
            nodes.append(helper.make_node("Cast", [name], [f"{name}_half"], to=half))
        names.append(f"{name}_half" if cast else name)
    nodes.append(helper.make_node(schema.name, names, ["mixed_half"], domain=DOMAIN, **schema.plugin_attributes))
    nodes.append(helper.make_node("Cast", ["mixed_half"], ["mixed"], to=TensorProto.FLOAT))
    return _model(nodes, [(name, TensorProto.INT32 if name == "expert_ids" else TensorProto.FLOAT, None)
                          for name in schema.inputs], [("mixed", TensorProto.FLOAT, None)])


def quantised_model(half: int, **attributes) -> bytes:
    """As `experts_model`, with weights of uint8 and scales that are cast too; attributes bits and group_size."""
    schema, nodes, names, inputs = experts.QUANTISED_SCHEMA, [], [], []
    kinds = {"expert_ids": TensorProto.INT32, "gate_up": TensorProto.UINT8, "down": TensorProto.UINT8}
    for name in schema.inputs:
        inputs.append((name, kinds.get(name, TensorProto.FLOAT), None))
        cast = name not in (*kinds, "expert_weights")
        if cast:
            nodes.append(helper.make_node("Cast", [name], [f"{name}_half"], to=half))
        names.append(f"{name}_half" if cast else name)
    nodes.append(helper.make_node(schema.name, names, ["mixed_half"], domain=DOMAIN, **schema.plugin_attributes,
                                  **attributes))
    nodes.append(helper.make_node("Cast", ["mixed_half"], ["mixed"], to=TensorProto.FLOAT))
    return _model(nodes, inputs, [("mixed", TensorProto.FLOAT, None)])


def in_fragments(feeds: dict[str, np.ndarray], bits: int) -> dict[str, np.ndarray]:
    """Inputs of a node with quantised experts, as kernels for GPUs read them."""
    weights = {name: weights_in_fragments(feeds[name], bits) for name in ("gate_up", "down")}
    return feeds | weights | {name: scales_in_fragments(feeds[name]) for name in feeds if name.endswith("_scales")}


def route_feeds(logits, bias, positions, top_p=0.6, min_experts=1, coreset_size=8) -> dict[str, np.ndarray]:
    """Inputs of DmoeBlockRoute."""
    values = (np.float32(logits), np.float32(bias), np.int64(positions), np.float32([top_p]), np.int64([min_experts]),
              np.int64([coreset_size]))
    return dict(zip(block_route.SCHEMA.inputs, values, strict=True))


def experts_case(tokens: int, k: int = 3, count: int = 8, hidden: int = 32, width: int = 24) -> dict[str, np.ndarray]:
    """Inputs of DmoeExperts, some places without an expert."""
    rng = np.random.default_rng(tokens)
    ids = np.array([rng.permutation(count)[:k] for _ in range(tokens)], np.int32).reshape(tokens, k)
    ids[rng.random(ids.shape) < 0.2] = -1
    values = (rng.normal(size=(tokens, hidden)), ids, rng.random((tokens, k)),
              rng.normal(size=(count, 2 * width, hidden)) * 0.2, rng.normal(size=(count, hidden, width)) * 0.2)
    return {name: value if name == "expert_ids" else value.astype(np.float32)
            for name, value in zip(experts.SCHEMA.inputs, values, strict=True)}
