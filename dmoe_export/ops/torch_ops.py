"""The ops as the eager model calls them: the eager implementation, or one custom node while torch.onnx traces."""

from __future__ import annotations

import torch
from torch import Tensor

from ..description import ExpertQuantisation
from . import attention as attention_op
from . import block_route as route_op
from . import experts as experts_op
from .attention.eager import attention as eager_attention
from .block_route.attributes import RouteAttributes
from .block_route.eager import block_route as eager_block_route
from .experts.eager import experts as eager_experts


def block_route(router_logits: Tensor, expert_bias: Tensor, position_ids: Tensor, top_p: Tensor, min_experts: Tensor,
                coreset_size: Tensor, attributes: RouteAttributes) -> tuple[Tensor, Tensor, Tensor]:
    """`DmoeBlockRoute`; arguments and results as in ops/block_route/__init__.py."""
    inputs = (router_logits, expert_bias, position_ids, top_p, min_experts, coreset_size)
    if not torch.onnx.is_in_onnx_export():
        return eager_block_route(*inputs, attributes)
    rows, tokens, experts = router_logits.shape
    places = (rows, tokens, attributes.experts_per_token)
    schema = route_op.SCHEMA
    ids, weights, coreset = torch.onnx.ops.symbolic_multi_out(
        schema.qualified_name, inputs, attributes.node_attributes(),
        dtypes=(torch.int32, torch.float32, torch.bool), shapes=(places, places, (rows, tokens, experts)),
        version=schema.version)
    return ids, weights, coreset


def attention(q: Tensor, key: Tensor, value: Tensor, past_key: Tensor, past_value: Tensor, bias: Tensor) -> Tensor:
    """`DmoeAttention`; arguments and result as in ops/attention/__init__.py."""
    inputs = (q, key, value, past_key, past_value, bias)
    if not torch.onnx.is_in_onnx_export() or q.dtype == torch.bfloat16:  # no kernels of ours take that: plain nodes
        return eager_attention(*inputs)
    schema = attention_op.SCHEMA
    return torch.onnx.ops.symbolic(schema.qualified_name, inputs, {}, dtype=q.dtype, shape=q.shape,
                                   version=schema.version)


def experts(hidden: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: Tensor, down: Tensor,
            scales: tuple[Tensor, Tensor] | None = None, quantisation: ExpertQuantisation | None = None) -> Tensor:
    """`DmoeExperts`; arguments and results as in ops/experts/__init__.py. `scales` of gate_up and of down."""
    inputs = (hidden, expert_ids, expert_weights, gate_up, down, *(scales or ()))
    if not torch.onnx.is_in_onnx_export():
        return eager_experts(*inputs)
    schema = experts_op.QUANTISED_SCHEMA if quantisation else experts_op.SCHEMA
    attributes = dict(schema.plugin_attributes) | (quantisation.model_dump() if quantisation else {})
    return torch.onnx.ops.symbolic(schema.qualified_name, inputs, attributes, dtype=hidden.dtype,
                                   shape=hidden.shape, version=schema.version)
