"""Eager PyTorch implementation of `DmoeBlockRoute`; differentiable through the expert weights."""

from __future__ import annotations

import torch
from torch import Tensor

from .attributes import RouteAttributes


def block_route(router_logits: Tensor, expert_bias: Tensor, position_ids: Tensor, top_p: Tensor, min_experts: Tensor,
                coreset_size: Tensor, attributes: RouteAttributes) -> tuple[Tensor, Tensor, Tensor]:
    """Expert ids [B,T,k] int32, weights [B,T,k] float32, coreset [B,T,E] bool; see the package docstring."""
    logits = router_logits.float()  # [B, T, E]
    scores = torch.sigmoid(logits) if attributes.score_function == "sigmoid" else torch.softmax(logits, dim=-1)
    valid = position_ids >= 0  # [B, T]
    with torch.no_grad():
        select = scores.detach() + expert_bias.float()
        coreset = _coreset(select, valid, position_ids, top_p, min_experts, coreset_size, attributes)
        ids = _select(select, coreset, attributes)  # [B, T, k], −1 = none
    weights = scores.gather(-1, ids.clamp(min=0)) * (ids >= 0)
    if attributes.renormalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return ids.to(torch.int32), weights * attributes.routed_scaling, coreset


def _ordered(values: Tensor) -> tuple[Tensor, Tensor]:
    """Sort the last axis: higher first, then lower index."""
    return torch.sort(values, dim=-1, descending=True, stable=True)


def _coreset(select: Tensor, valid: Tensor, position_ids: Tensor, top_p: Tensor, min_experts: Tensor,
             coreset_size: Tensor, attributes: RouteAttributes) -> Tensor:
    rows, tokens, experts = select.shape
    if attributes.mode == "token":
        return valid[..., None].expand(rows, tokens, experts).clone()
    if not tokens:  # a salient step may have nothing to route
        return valid.new_zeros(rows, 0, experts)
    # One slot per block: slots are numbered over the whole batch, padding falls into a last one that is dropped.
    blocks = position_ids.clamp(min=0) // attributes.block_length
    row_ids = torch.arange(rows, device=select.device)[:, None]
    keys = torch.where(valid, row_ids * (blocks.max() + 1) + blocks, -1)
    unique, slot = torch.unique(keys, return_inverse=True)  # slot [B, T]
    flat_slot, flat_valid = slot.reshape(-1), valid.reshape(-1, 1)
    flat = select.reshape(-1, experts)
    if attributes.mode == "top_p":
        top_values, top_ids = (x[:, : attributes.experts_per_token] for x in _ordered(flat))
        kept = torch.zeros_like(flat).scatter(-1, top_ids, top_values) * flat_valid
        votes = torch.zeros(len(unique), experts, device=select.device).index_add(0, flat_slot, kept)
        votes = votes / (votes.sum(-1, keepdim=True) + 1e-20)
        sorted_votes, order = _ordered(votes)
        before = _exclusive_cumsum(sorted_votes)
        voted = ((before <= top_p) | (top_p >= 1)) & (sorted_votes > 0)
        count = torch.maximum(voted.sum(-1, keepdim=True), min_experts)
    else:
        best = torch.full((len(unique), experts), float("-inf"), device=select.device)
        candidates = flat.masked_fill(~flat_valid, float("-inf"))
        best = best.scatter_reduce(0, flat_slot[:, None].expand_as(flat), candidates, "amax")
        order = _ordered(best)[1]
        count = coreset_size
    in_rank = torch.arange(experts, device=select.device) < count
    per_slot = torch.zeros(len(unique), experts, dtype=torch.bool, device=select.device)
    per_slot = per_slot.scatter(-1, order, in_rank.expand(len(unique), experts))
    return per_slot[slot] & valid[..., None]


def _exclusive_cumsum(values: Tensor) -> Tensor:
    """Sum of the entries before each one, in order."""
    return torch.cat([torch.zeros_like(values[..., :1]), values.cumsum(-1)[..., :-1]], dim=-1)


def _select(select: Tensor, coreset: Tensor, attributes: RouteAttributes) -> Tensor:
    """Group-limited top-k inside the coreset, then the best of the coreset outside the kept groups, then −1."""
    k, groups = attributes.experts_per_token, attributes.num_groups
    inside = select.masked_fill(~coreset, float("-inf"))
    in_group = _kept_groups(inside, attributes).repeat_interleave(select.shape[-1] // groups, dim=-1)
    first, first_ids = (x[..., :k] for x in _ordered(inside.masked_fill(~in_group, float("-inf"))))
    other, other_ids = (x[..., :k] for x in _ordered(inside.masked_fill(in_group, float("-inf"))))
    places = torch.arange(k, device=select.device).expand_as(first_ids)
    taken = torch.isfinite(first).sum(-1, keepdim=True)
    refill = (places - taken).clamp(min=0)
    ids = torch.where(places < taken, first_ids, other_ids.gather(-1, refill))
    filled = places < taken + torch.isfinite(other).sum(-1, keepdim=True)
    return torch.where(filled, ids, -1)


def _kept_groups(inside: Tensor, attributes: RouteAttributes) -> Tensor:
    """Which groups stay, [B, T, G] bool: group score = sum of the two largest selection scores."""
    size = inside.shape[-1] // attributes.num_groups
    grouped = inside.reshape(*inside.shape[:-1], attributes.num_groups, size)
    group_scores = grouped.topk(min(2, size), dim=-1).values.sum(-1)
    best = _ordered(group_scores)[1][..., : attributes.groups_kept]
    return torch.zeros_like(group_scores, dtype=torch.bool).scatter(-1, best, True)
