"""`DmoeBlockRoute`: router logits → expert ids and weights, with one coreset of experts per block.

Sources: dMoE, arXiv 2605.30876, Algorithm 1 and its reference code (top_p); LLaDA2.0 report (token);
LLaDA2.2-flash report (top_c).

For every token, scores `s` (sigmoid or softmax of the logits, float32) and selection scores `r = s + expert_bias`:

1. A *block* is the valid tokens (position ≥ 0) of one row with the same `position // block_length`.
2. Coreset of a block, by mode:
   * `token`: all experts.
   * `top_p`: each token keeps `r` of its plain top-k, 0 elsewhere; `votes` = sum over the block / (their sum + 1e-20).
     In order of votes keep experts while the sum of the votes *before* them is ≤ top_p (so the one that crosses
     stays, and the first always does); an expert without a positive vote is never kept by this rule; `top_p ≥ 1`
     keeps every voted expert. Then fill up to `min_experts` in the same order.
   * `top_c`: the `coreset_size` experts with the largest maximum of `r` over the block (the report's *pool*).
3. Selection, per token: `r` outside the coreset is −inf; a group scores the sum of its two largest `r`; the best
   `groups_kept` groups stay; the top-k of `r` inside them are the token's experts. LLaDA2.2 limits no groups, neither
   for the pool nor for the token: `RouteAttributes.of` gives `top_c` one group, which is kept, and the op does what
   its attributes say.
4. A token never leaves its coreset. When the kept groups hold fewer than k coreset experts, the places left are
   filled with the best coreset experts of the other groups; when the coreset has fewer than k, with id −1, weight 0.
   (The reference takes −inf experts there and gives them weight.) `top_c` is defined for k ≤ `coreset_size` ≤ E:
   exports and requests refuse less, so only the op itself ever sees it.
5. Weights: `s[ids]`, divided by their sum + 1e-20 if `renormalise`, times `routed_scaling`.
6. Padding (position < 0) neither votes nor is routed: ids −1, weights 0, empty coreset.

Ties everywhere: higher score first, then lower index.
"""

from ..schema import OpSchema

SCHEMA = OpSchema(
    name="DmoeBlockRoute",
    version=1,
    inputs=(
        "router_logits",  # [B, T, E] float32
        "expert_bias",  # [E] float32
        "position_ids",  # [B, T] int64, −1 = padding
        "top_p",  # [1] float32
        "min_experts",  # [1] int64
        "coreset_size",  # [1] int64
    ),
    outputs=(
        "expert_ids",  # [B, T, k] int32, −1 = none
        "expert_weights",  # [B, T, k] float32
        "coreset",  # [B, T, E] bool: the coreset of the token's block
    ),
    attributes=("mode", "block_length", "experts_per_token", "num_groups", "groups_kept", "routed_scaling",
                "score_function", "renormalise"),
)
