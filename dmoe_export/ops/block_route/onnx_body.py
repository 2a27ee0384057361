"""ONNX body of `DmoeBlockRoute` in standard ops, written for one set of attributes.

Blocks are not numbered here: each token sums over the tokens of its own block (a [T, T] product), so a row may hold
any number of blocks at any offset with static shapes. TopK's tie rule (higher first, then lower index) is ours.
"""

from __future__ import annotations

import onnx
import onnx.parser

from ..schema import DOMAIN, OPSET, int64s
from . import SCHEMA
from .attributes import RouteAttributes


def block_route_body(attributes: RouteAttributes, num_experts: int) -> onnx.FunctionProto:
    """The function body for these attributes and E experts."""
    a = attributes
    text = f"""
    <opset_import: ["" : {OPSET}], domain: "{DOMAIN}">
    {SCHEMA.name} <{", ".join((*SCHEMA.attributes, "plugin_namespace", "plugin_version"))}>
      ({", ".join(SCHEMA.inputs)}) => ({", ".join(SCHEMA.outputs)})
    {{
      zero_i = Constant <value_int = 0> ()
      zero = Constant <value_float = 0.0> ()
      one = Constant <value_float = 1.0> ()
      tiny = Constant <value_float = 1e-20> ()
      no_float = Constant <value_float = -inf> ()
      last = {int64s(-1)}
      k = {int64s(a.experts_per_token)}
      experts = {int64s(num_experts)}
      {_SCORES[a.score_function]}
      select = Add (scores, expert_bias)
      is_valid = GreaterOrEqual (position_ids, zero_i)
      valid = Unsqueeze (is_valid, last)
      {_same_block(a) if a.mode != "token" else ""}
      {_CORESET[a.mode]}
      {_select(a, num_experts)}
      found_ids = Max (ids, zero_i)
      found_scores = GatherElements <axis = -1> (scores, found_ids)
      real = GreaterOrEqual (ids, zero_i)
      raw_weights = Where (real, found_scores, zero)
      {_RENORMALISE if a.renormalise else "weights = Identity (raw_weights)"}
      scaling = Constant <value_float = {a.routed_scaling}> ()
      expert_weights = Mul (weights, scaling)
      expert_ids = Cast <to = 6> (ids)
    }}
    """
    return onnx.parser.parse_function(text)


_SCORES = {
    "sigmoid": "scores = Sigmoid (router_logits)",
    "softmax": "scores = Softmax <axis = -1> (router_logits)",
}

_RENORMALISE = """
      weight_sum = ReduceSum (raw_weights, last)
      weight_norm = Add (weight_sum, tiny)
      weights = Div (raw_weights, weight_norm)
"""


def _same_block(a: RouteAttributes) -> str:
    """`same_block [B, T, T]`: the valid tokens of the same block, as seen from each token."""
    return f"""
      length = Constant <value_int = {a.block_length}> ()
      real_position = Max (position_ids, zero_i)
      block = Div (real_position, length)
      second = {int64s(1)}
      block_column = Unsqueeze (block, last)
      block_row = Unsqueeze (block, second)
      equal_block = Equal (block_column, block_row)
      valid_row = Unsqueeze (is_valid, second)
      same_block = And (equal_block, valid_row)
"""


_TO_MEMBERS = """
      rank = Range (zero_i, num_experts, one_i)
      in_rank = Less (rank, limit)
      member_rank = Cast <to = 1> (in_rank)
      order_shape = Shape (order)
      member_sorted = Expand (member_rank, order_shape)
      nobody = ConstantOfShape (order_shape)
      member = ScatterElements <axis = -1> (nobody, order, member_sorted)
      in_coreset = Greater (member, zero)
      coreset = And (in_coreset, valid)
"""

_RANKS = """
      one_i = Constant <value_int = 1> ()
      num_experts = Squeeze (experts)
"""

_CORESET = {
    "token": """
      select_shape = Shape (select)
      coreset = Expand (valid, select_shape)
""",
    "top_p": f"""
      top_values, top_ids = TopK <axis = -1> (select, k)
      select_shape = Shape (select)
      blank = ConstantOfShape (select_shape)
      kept = ScatterElements <axis = -1> (blank, top_ids, top_values)
      voters = Cast <to = 1> (same_block)
      raw_votes = MatMul (voters, kept)
      vote_sum = ReduceSum (raw_votes, last)
      vote_norm = Add (vote_sum, tiny)
      votes = Div (raw_votes, vote_norm)
      sorted_votes, order = TopK <axis = -1> (votes, experts)
      last_axis = Constant <value_int = -1> ()
      before = CumSum <exclusive = 1> (sorted_votes, last_axis)
      below_p = LessOrEqual (before, top_p)
      all_voted = GreaterOrEqual (top_p, one)
      wanted = Or (below_p, all_voted)
      has_vote = Greater (sorted_votes, zero)
      voted = And (wanted, has_vote)
      voted_i = Cast <to = 7> (voted)
      voted_count = ReduceSum (voted_i, last)
      limit = Max (voted_count, min_experts)
      {_RANKS}
      {_TO_MEMBERS}
""",
    "top_c": f"""
      by_token = {int64s(1)}
      seen = Unsqueeze (same_block, last)
      select_row = Unsqueeze (select, by_token)
      candidates = Where (seen, select_row, no_float)
      by_voter = {int64s(2)}
      best = ReduceMax <keepdims = 0> (candidates, by_voter)
      best_sorted, order = TopK <axis = -1> (best, experts)
      limit = Identity (coreset_size)
      {_RANKS}
      {_TO_MEMBERS}
""",
}


def _select(a: RouteAttributes, num_experts: int) -> str:
    """Group-limited top-k; outside `token` mode also the refill from other groups and the −1 places."""
    size = num_experts // a.num_groups
    masked = "inside = Where (coreset, select, no_float)"
    if a.groups_kept == a.num_groups:
        first = "first, first_ids = TopK <axis = -1> (inside, k)"
        refill = """
      finite_first = Greater (first, no_float)
      ids = Where (finite_first, first_ids, last)
"""
        return masked + "\n" + first + refill
    groups = f"""
      {masked}
      group_shape = {int64s(0, 0, a.num_groups, size)}
      grouped = Reshape (inside, group_shape)
      pair = {int64s(min(2, size))}
      best_pair, best_pair_ids = TopK <axis = -1> (grouped, pair)
      group_scores = ReduceSum <keepdims = 0> (best_pair, last)
      groups_kept_n = {int64s(a.groups_kept)}
      kept_scores, kept_groups = TopK <axis = -1> (group_scores, groups_kept_n)
      group_scores_shape = Shape (group_scores)
      no_group = ConstantOfShape (group_scores_shape)
      kept_scores_shape = Shape (kept_groups)
      kept_ones = Expand (one, kept_scores_shape)
      group_member = ScatterElements <axis = -1> (no_group, kept_groups, kept_ones)
      group_kept = Greater (group_member, zero)
      group_column = Unsqueeze (group_kept, last)
      grouped_shape = Shape (grouped)
      group_wide = Expand (group_column, grouped_shape)
      inside_shape = Shape (inside)
      in_group = Reshape (group_wide, inside_shape)
      in_kept = Where (in_group, inside, no_float)
      first, first_ids = TopK <axis = -1> (in_kept, k)
"""
    if a.mode == "token":
        return groups + """
      finite_first = Greater (first, no_float)
      ids = Where (finite_first, first_ids, last)
"""
    return groups + f"""
      in_others = Where (in_group, no_float, inside)
      other, other_ids = TopK <axis = -1> (in_others, k)
      finite_first = Greater (first, no_float)
      finite_other = Greater (other, no_float)
      first_n = Cast <to = 7> (finite_first)
      other_n = Cast <to = 7> (finite_other)
      taken = ReduceSum (first_n, last)
      more = ReduceSum (other_n, last)
      place = {int64s(*range(a.experts_per_token))}
      past_first = Sub (place, taken)
      refill_place = Max (past_first, zero_i)
      refill_ids = GatherElements <axis = -1> (other_ids, refill_place)
      is_first = Less (place, taken)
      chosen = Where (is_first, first_ids, refill_ids)
      available = Add (taken, more)
      is_filled = Less (place, available)
      ids = Where (is_filled, chosen, last)
"""
