"""The ops as the eager model calls them: the eager implementation, or one custom node while torch.onnx traces."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..weight_formats import ExpertQuantisation
from . import add_norm as add_norm_op
from . import attention as attention_op
from . import experts as experts_op
from . import head as head_op
from . import mixture as mixture_op
from . import router as router_op
from . import self_attention as self_attention_op
from .add_norm.eager import add_norm as eager_add_norm
from .attention.eager import attention as eager_attention
from .block_route.attributes import RouteAttributes
from .experts import Activation, activation_attribute
from .experts.eager import experts as eager_experts
from .head.eager import head as eager_head
from .mixture.eager import mixture as eager_mixture
from .router.eager import router as eager_router
from .schema import OpSchema
from .self_attention.eager import self_attention as eager_self_attention

Shape = tuple[Any, ...]


def self_attention(qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, past_positions: Tensor,
                   past_key: Tensor, past_value: Tensor, norms: tuple[Tensor, ...], *, block_length: int,
                   eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """`DmoeSelfAttention`; arguments and results as in ops/self_attention/__init__.py. `norms` of q and k, or none."""
    inputs = (qkv, cos, sin, position_ids, past_positions, past_key, past_value, *norms)
    if not torch.onnx.is_in_onnx_export():
        return eager_self_attention(*inputs, block_length=block_length, eps=eps)
    rows, tokens = position_ids.shape
    _, kv_heads, _, head_dim = past_key.shape
    new = (rows, kv_heads, tokens, head_dim)
    schema = self_attention_op.NORMED_SCHEMA if norms else self_attention_op.SCHEMA
    mixed, key, value = _node(schema, inputs, {"block_length": block_length, "eps": eps, "head_norm": int(bool(norms))},
                              (qkv.dtype, (qkv.shape[0], qkv.shape[1] - 2 * kv_heads * head_dim)), (qkv.dtype, new),
                              (qkv.dtype, new))
    return mixed, key, value


def attention(q: Tensor, key: Tensor, value: Tensor, past_key: Tensor, past_value: Tensor, bias: Tensor) -> Tensor:
    """`DmoeAttention`; arguments and result as in ops/attention/__init__.py."""
    inputs = (q, key, value, past_key, past_value, bias)
    if not torch.onnx.is_in_onnx_export():
        return eager_attention(*inputs)
    return _node(attention_op.SCHEMA, inputs, {}, (q.dtype, q.shape))[0]


def router(hidden: Tensor, router_weight: Tensor, expert_bias: Tensor, position_ids: Tensor, top_p: Tensor,
           min_experts: Tensor, coreset_size: Tensor, attributes: RouteAttributes) -> tuple[Tensor, Tensor, Tensor]:
    """`DmoeRouter`; arguments and results as in ops/router/__init__.py."""
    inputs = (hidden, router_weight, expert_bias, position_ids, top_p, min_experts, coreset_size)
    if not torch.onnx.is_in_onnx_export():
        return eager_router(*inputs, attributes)
    places = (hidden.shape[0], attributes.experts_per_token)
    ids, weights, logits = _node(router_op.SCHEMA, inputs, attributes.node_attributes(), (torch.int32, places),
                                 (torch.float32, places), (torch.float32, (*position_ids.shape, len(router_weight))))
    return ids, weights, logits


def experts(hidden: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: Tensor, down: Tensor,
            scales: tuple[Tensor, Tensor] | None = None, quantisation: ExpertQuantisation | None = None,
            activation: Activation = "silu") -> Tensor:
    """`DmoeExperts`; arguments and results as in ops/experts/__init__.py. `scales` of gate_up and of down."""
    inputs = (hidden, expert_ids, expert_weights, gate_up, down, *(scales or ()))
    if not torch.onnx.is_in_onnx_export():
        return eager_experts(*inputs, activation=activation)
    schema = experts_op.QUANTISED_SCHEMA if quantisation else experts_op.SCHEMA
    attributes = _integers(quantisation) | activation_attribute(activation)
    return _node(schema, inputs, attributes, (hidden.dtype, hidden.shape))[0]


def mixture(hidden: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: Tensor, down: Tensor,
            scales: tuple[Tensor, Tensor] | None, quantisation: ExpertQuantisation | None,
            shared: tuple[Tensor, Tensor], activation: Activation = "silu") -> Tensor:
    """`DmoeMixture`; arguments and results as in ops/mixture/__init__.py. `shared`: gate_up and down."""
    inputs = (hidden, expert_ids, expert_weights, gate_up, down, *(scales or ()), *shared)
    if not torch.onnx.is_in_onnx_export():
        return eager_mixture(*inputs, activation=activation)
    schema = mixture_op.QUANTISED_SCHEMA if quantisation else mixture_op.SCHEMA
    attributes = _integers(quantisation) | activation_attribute(activation)
    return _node(schema, inputs, attributes, (hidden.dtype, hidden.shape))[0]


def add_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`DmoeAddNorm`; arguments and results as in ops/add_norm/__init__.py."""
    if not torch.onnx.is_in_onnx_export():
        return eager_add_norm(x, delta, weight, eps)
    total, normed = _node(add_norm_op.SCHEMA, (x, delta, weight), {"eps": eps}, (x.dtype, x.shape), (x.dtype, x.shape))
    return total, normed


def head(hidden: Tensor, norm: Tensor, weight: Tensor, logit_rows: Tensor, logits_kept: Tensor, *, eps: float,
         mask_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """`DmoeHead`; arguments and results as in ops/head/__init__.py."""
    inputs = (hidden, norm, weight, logit_rows, logits_kept)
    if not torch.onnx.is_in_onnx_export():
        return eager_head(*inputs, eps=eps, mask_id=mask_id)
    few = (logit_rows.shape[0], logits_kept.shape[0], weight.shape[0])
    token_ids, confidence, logits = _node(
        head_op.SCHEMA, inputs, {"eps": eps, "mask_id": mask_id}, (torch.int64, logit_rows.shape),
        (torch.float32, logit_rows.shape), (torch.float32, few))
    return token_ids, confidence, logits


def first_rows(logits: Tensor, kept: Tensor) -> Tensor:
    """[B, M, V] → the first L of axis 1, L the length of `kept`."""
    if not torch.onnx.is_in_onnx_export():
        return logits[:, :kept.shape[0]]
    # As nodes: torch would have to know that L ≤ M.
    length = torch.onnx.ops.symbolic("Shape", (kept,), dtype=torch.int64, shape=(1,))
    first, axis = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.int64)
    return torch.onnx.ops.symbolic("Slice", (logits, first, length, axis), dtype=logits.dtype,
                                   shape=(logits.shape[0], kept.shape[0], logits.shape[2]))


def _integers(quantisation: ExpertQuantisation | None) -> dict[str, Any]:
    """As attributes."""
    return quantisation.model_dump() if quantisation else {}


def _node(schema: OpSchema, inputs: tuple[Tensor, ...], attributes: dict[str, Any],
          *outputs: tuple[torch.dtype, Shape]) -> tuple[Tensor, ...]:
    """One node of the traced graph; types and shapes of its outputs."""
    return tuple(torch.onnx.ops.symbolic_multi_out(
        schema.qualified_name, inputs, schema.plugin_attributes | attributes, dtypes=[dtype for dtype, _ in outputs],
        shapes=[tuple(shape) for _, shape in outputs], version=schema.version))
