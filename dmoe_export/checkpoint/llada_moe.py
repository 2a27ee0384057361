"""Family `llada_moe`: LLaDA-MoE-7B-A1B (arXiv 2509.24389; class LLaDAMoEModelLM), OLMoE-like and bidirectional.

Its model_type is `llada`, as the dense model's: only the architecture tells them apart.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..description import ModelDescription, MoeDescription
from .config_fields import MOST_LAYERS, MOST_POSITIONS, Fields
from .layout import Layout, below, split_qkv, swiglu, weights
from .rope import read_rotary

_PUBLISHED = 157184, 156895, 156892  # vocabulary, mask, EOS: the mask is generate's default and in no config.json

# Fields that must be there: the reference's class (LLaDAConfig in configuration_lladamoe.py of the hub) has
# placeholders for defaults, here beside what the published file says. Shared, and filled in: rms_norm_eps 1e-5,
# tie_word_embeddings false, num_key_value_heads = num_attention_heads.
_STATED: dict[str, tuple[Any, Any]] = {
    "rope_theta": (-1, 50000), "partial_rotary_factor": (-1, 1), "qk_layernorm": (None, True),
    "moe_layer_freq": ([], "a 1 for each layer")}


class LladaMoe:
    """Reads config.json and names the tensors of a LLaDA-MoE checkpoint."""

    name, model_type = "llada_moe", "llada"
    architectures = ("LLaDAMoEModelLM",)
    block_length, block_in_name = 32, False
    _layout = Layout(
        family=name, layer_prefix="model.layers.{}.",
        outer=weights(embed="model.embed_tokens", norm="model.norm", lm_head="lm_head"),
        layer={**weights(attention_norm="input_layernorm", ffn_norm="post_attention_layernorm"),
               **split_qkv("self_attn.", bias=False),
               **below("attention.", weights(q_norm="self_attn.q_norm", k_norm="self_attn.k_norm",
                                             out="self_attn.o_proj"))},
        dense_ffn=below("ffn.", swiglu("mlp")), router=below("ffn.", weights(router="mlp.gate")))

    def describe(self, config: dict[str, Any], source: Path) -> ModelDescription:
        """The description; unsupported or contradictory fields are errors."""
        f = Fields(config, source, defaults=_STATED)
        f.only("hidden_act", ("silu",))
        for name in ("attention_bias", "moe_router_enable_expert_bias", "norm_topk_prob", "use_sliding_window"):
            f.only(name, (False,))  # the reference never renormalises, whatever norm_topk_prob says
        f.only("moe_router_score_function", ("softmax",))
        f.only("routed_scaling_factor", (1,))
        f.only("router_num_group", (1,))
        f.only("router_topk_group", (1,))
        for name in ("shared_expert_intermediate_size", "clip_qkv"):
            f.only(name, ())
        vocab, heads = f.positive("vocab_size"), f.heads("hidden_size", "num_attention_heads", "num_key_value_heads")
        theta, rotary = read_rotary(f, heads["head_dim"], share=None)
        layers = f.positive("num_hidden_layers", most=MOST_LAYERS)
        dense = self._dense_layers(f, layers)
        description = ModelDescription(
            family=self.name, architecture=self.architectures[0], vocab_size=vocab,
            hidden_size=f.positive("hidden_size"), num_layers=layers, **heads,
            dense_width=f.positive("dense_intermediate_size") if dense else 0, moe=self._moe(f, dense),
            qk_norm=f.get("qk_layernorm", bool), rope_theta=theta,
            rotary_dim=rotary, rms_eps=f.get("rms_norm_eps", float, 1e-5),
            max_positions=f.positive("max_position_embeddings", most=MOST_POSITIONS),
            tie_embeddings=f.get("tie_word_embeddings", bool, False), attention="full",
            **f.ids(vocab, _PUBLISHED))
        f.refuse_unread(("dense_intermediate_size",))  # of layers without experts, of which there may be none
        return description

    def _dense_layers(self, f: Fields, layers: int) -> int:
        """How many layers come before the first with experts; any other pattern is refused."""
        if not f.has("moe_layer_freq"):
            raise f.missing("moe_layer_freq")
        pattern = f.config["moe_layer_freq"]
        dense = pattern.count(0) if isinstance(pattern, list) else 0
        if pattern != [0] * dense + [1] * (layers - dense) or dense == layers:
            raise f.refuse(f"moe_layer_freq is {pattern!r}, which is not supported (supported: a list of "
                           f"{layers} numbers, zeros for dense layers first, then ones)")
        return dense

    def _moe(self, f: Fields, dense: int) -> MoeDescription:
        experts, k = f.positive("num_experts"), f.positive("num_experts_per_tok")
        if k > experts:
            raise f.refuse(f"num_experts_per_tok {k} exceeds num_experts {experts}")
        return MoeDescription(
            num_experts=experts, experts_per_token=k, expert_width=f.positive("expert_intermediate_size"),
            shared_width=0, num_groups=1, groups_kept=1, routed_scaling=1.0, score_function="softmax",
            renormalise=False, expert_bias=False, first_dense_layers=dense)

    def layout(self, description: ModelDescription) -> Layout:
        """The names of its tensors."""
        return self._layout


LLADA_MOE = LladaMoe()
