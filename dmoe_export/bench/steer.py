"""Exactly so many active experts: the router's logits of a copy of the graph are moved, so that they choose them.

The router's product, the routing node and everything after it run as they are; one addition of [B, T, E] numbers per
MoE layer is put before the routing node.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..description import ModelDescription
from ..errors import CheckError, RequestError

_PULL = 6.0  # of a logit: far enough from what random routers give, near enough that a sigmoid still tells scores apart


def assign(tokens: int, active: int, description: ModelDescription) -> NDArray[np.int64]:
    """Expert ids [T, k]: every one of `active` experts is used, evenly, within the groups a token may keep.

    Raises RequestError where that cannot be.
    """
    moe = description.experts
    k, size = moe.experts_per_token, moe.num_experts // moe.num_groups
    if not k <= active <= min(moe.num_experts, tokens * k):
        raise RequestError(f"{active} active experts cannot be: {tokens} tokens with {k} experts each use between {k} "
                           f"and {min(moe.num_experts, tokens * k)}.")
    groups = max(moe.groups_kept, -(-active // size))
    # Expert 0 of every group in use, then expert 1 of every group, and so on.
    chosen = np.array([g * size + i for i in range(size) for g in range(groups)][:active])
    uses = np.zeros(active, np.int64)
    ids = np.zeros((tokens, k), np.int64)
    group_of = chosen // size
    for token in range(tokens):
        fresh = np.bincount(group_of[uses == 0], minlength=groups)
        load = np.bincount(group_of, uses, minlength=groups)
        kept = np.lexsort((load, -fresh))[:moe.groups_kept]
        allowed = np.flatnonzero(np.isin(group_of, kept))
        best = allowed[np.argsort(uses[allowed], kind="stable")[:k]]
        if len(best) < k:
            break
        uses[best] += 1
        ids[token] = chosen[best]
    if not (uses > 0).all():
        raise RequestError(f"{active} active experts cannot be spread over {tokens} tokens of {k} experts from "
                           f"{moe.groups_kept} of {moe.num_groups} groups; ask for fewer, or for more --tokens.")
    return ids


def steer(model: Any, ids: NDArray[np.int64], num_experts: int) -> None:
    """Make an onnx.ModelProto route its tokens to `ids` [T, k] in every MoE layer (for one row of T tokens)."""
    from onnx import helper, numpy_helper

    pull = np.full((1, len(ids), num_experts), -_PULL, np.float32)
    np.put_along_axis(pull[0], ids, _PULL, axis=-1)
    nodes = list(model.graph.node)
    routes = [i for i, node in enumerate(nodes) if node.op_type == "DmoeBlockRoute"]
    if not routes:
        raise CheckError("The graph has no DmoeBlockRoute node whose logits could be moved; leave --active-experts "
                         "out.")
    model.graph.initializer.append(numpy_helper.from_array(pull, "bench.pull"))
    for i in reversed(routes):
        moved = f"bench.logits.{i}"
        nodes.insert(i, helper.make_node("Add", [nodes[i].input[0], "bench.pull"], [moved], name=f"bench_pull_{i}"))
        nodes[i + 1].input[0] = moved
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def settings(mode: str, active: int) -> dict[str, float | int]:
    """Routing settings under which the coreset is the active experts: whoever has a vote, or the best `active`."""
    known: dict[str, dict[str, float | int]] = {"top_p": {"top_p": 1.0, "min_experts": 1},
                                                "top_c": {"coreset_size": active}}
    return known.get(mode, {})
