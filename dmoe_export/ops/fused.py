"""Ops that are made of others of ours, and graphs in which these take their places."""

from __future__ import annotations

from collections.abc import Collection

import onnx
import onnx.inliner

from . import add_norm, attention, head, mixture, router, self_attention
from .schema import DOMAIN

FUSED = frozenset(op.SCHEMA.name for op in (add_norm, head, mixture, router, self_attention))
PLAIN = FUSED | {attention.SCHEMA.name}  # with attention as standard ops, too, for a runtime that has no kernel of it


def inlined(model: onnx.ModelProto, ops: Collection[str] = FUSED) -> onnx.ModelProto:
    """The model with the bodies' nodes in place of the nodes of these ops, named after them."""
    found = [(DOMAIN, function.name) for function in model.functions if function.name in ops]
    if not found:
        return model
    flat = onnx.inliner.inline_selected_functions(model, found)
    for i, node in enumerate(flat.graph.node):
        node.name = node.name or f"{node.op_type}_{i}"
    return flat
