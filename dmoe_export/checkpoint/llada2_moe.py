"""Family `llada2_moe`: LLaDA2.0/2.1-mini, -flash, LLaDA2.2-flash, dMoE-16B (spec models.md; class LLaDA2MoeModelLM)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..description import ModelDescription, MoeDescription
from .config_fields import MOST_LAYERS, MOST_POSITIONS, Fields
from .edit_tokens import read_edit_tokens
from .harmless_fields import words
from .layout import Layout, below, shared_swiglu, swiglu, weights
from .rope import read_rotary

_PUBLISHED = 157184, 156895, 156892  # vocabulary, mask, EOS: what generate takes where config.json lacks them

# Fields that must be there: the default of the reference's LLaDA2MoeConfig (configuration_llada2_moe.py of the hub,
# also in inclusionAI/dFactory), and what every published file says instead.
_STATED: dict[str, tuple[Any, Any]] = {
    "rope_theta": (10000.0, 600000), "rms_norm_eps": (1e-5, 1e-6), "num_shared_experts": (0, 1),
    "first_k_dense_replace": (0, 1)}
# Its defaults that published files share are filled in: head_dim = hidden / heads, use_qk_norm true, n_group 8,
# topk_group 4, routed_scaling_factor 2.5, partial_rotary_factor 0.5, tie_word_embeddings false. Its use_bias is true
# and theirs false; where the field is absent, tensors decide, as biases would be strangers.

# Read by export/routing.py; or by no code (core_size); or of no meaning while sliding windows are off.
_ELSEWHERE = words("core_threshold core_size expert_capacity block_size sliding_window max_window_layers")


class Llada2Moe:
    """Reads config.json and names the tensors of a LLaDA2-MoE checkpoint."""

    name = model_type = "llada2_moe"
    architectures = ("LLaDA2MoeModelLM",)
    _layout = Layout(
        family=name, layer_prefix="model.layers.{}.",
        outer=weights(embed="model.word_embeddings", norm="model.norm", lm_head="lm_head"),
        layer={**weights(attention_norm="input_layernorm", ffn_norm="post_attention_layernorm"),
               **below("attention.", weights(qkv="attention.query_key_value", q_norm="attention.query_layernorm",
                                             k_norm="attention.key_layernorm", out="attention.dense"))},
        dense_ffn=below("ffn.", swiglu("mlp")), shared_ffn=below("ffn.shared.", shared_swiglu("mlp.shared_experts")),
        router={"ffn.router.weight": ("mlp.gate.weight",), "ffn.router.expert_bias": ("mlp.gate.expert_bias",)})

    def describe(self, config: dict[str, Any], source: Path) -> ModelDescription:
        """The description; unsupported or contradictory fields are errors."""
        f = Fields(config, source, defaults=_STATED)
        for name in ("use_bias", "use_qkv_bias", "use_sliding_window", "norm_head", "norm_softmax",
                     "using_split_qkv_in_self_attention"):
            f.only(name, (False,))
        for name in ("moe_router_enable_expert_bias", "use_rmsnorm"):
            f.only(name, (True,))
        f.only("norm_topk_prob", (True,))  # the reference renormalises whatever it says, SGLang does as it says
        f.only("hidden_act", ("silu",))
        f.only("score_function", ("sigmoid",))
        f.only("router_dtype", ("fp32",))
        f.only("mode", ("aggregate",))  # of dMoE's coreset
        vocab, hidden = f.positive("vocab_size"), f.positive("hidden_size")
        heads, kv_heads = f.positive("num_attention_heads"), f.positive("num_key_value_heads")
        head_dim = f.positive("head_dim", hidden // heads)
        if heads % kv_heads:
            raise f.refuse(f"num_key_value_heads {kv_heads} does not divide num_attention_heads {heads}")
        layers, dense = f.positive("num_hidden_layers", most=MOST_LAYERS), f.get("first_k_dense_replace", int)
        if not 0 <= dense < layers:
            raise f.refuse(f"first_k_dense_replace {dense} leaves no layer with experts of num_hidden_layers {layers}")
        theta, rotary = read_rotary(f, head_dim, share=0.5)
        if f.get("rotary_dim", int, rotary) != rotary:
            raise f.refuse(f"rotary_dim {config['rotary_dim']} contradicts partial_rotary_factor, which gives {rotary}")
        description = ModelDescription(
            family=self.name, architecture=self.architectures[0], vocab_size=vocab, hidden_size=hidden,
            num_layers=layers, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim,
            dense_width=f.positive("intermediate_size"), moe=self._moe(f, dense),
            qk_norm=f.get("use_qk_norm", bool, True), rope_theta=theta, rotary_dim=rotary,
            rms_eps=f.get("rms_norm_eps", float),
            max_positions=f.positive("max_position_embeddings", most=MOST_POSITIONS),
            tie_embeddings=f.get("tie_word_embeddings", bool, False),
            edit_tokens=read_edit_tokens(f), **f.ids(vocab, _PUBLISHED))
        f.refuse_unread(_ELSEWHERE)
        return description

    def _moe(self, f: Fields, dense: int) -> MoeDescription:
        experts, k = f.positive("num_experts"), f.positive("num_experts_per_tok")
        groups, kept = self._groups(f)
        if k > experts:
            raise f.refuse(f"num_experts_per_tok {k} exceeds num_experts {experts}")
        if experts % groups:
            raise f.refuse(f"n_group {groups} does not divide num_experts {experts}")
        if kept > groups:
            raise f.refuse(f"topk_group {kept} exceeds n_group {groups}")
        if k > kept * (experts // groups):
            raise f.refuse(f"num_experts_per_tok {k} exceeds the {kept * (experts // groups)} experts of "
                           f"{kept} kept groups")
        width, shared = f.positive("moe_intermediate_size"), f.get("num_shared_experts", int)
        if shared < 0:
            raise f.refuse(f"num_shared_experts is {shared}, it must be 0 or more")
        f.only("moe_shared_expert_intermediate_size", (width,))  # SGLang's own width of the shared expert
        return MoeDescription(
            num_experts=experts, experts_per_token=k, expert_width=width, shared_width=shared * width,
            num_groups=groups, groups_kept=kept, routed_scaling=f.get("routed_scaling_factor", float, 2.5),
            renormalise=k > 1,  # the reference leaves a single expert's score as it is
            first_dense_layers=dense)

    def _groups(self, f: Fields) -> tuple[int, int]:
        """Groups of experts and how many a token keeps; absent, the class's 8 and 4.

        The hub's code fails on null, and so does SGLang's (`srt/models/llada2.py` asks whether it is above 0). With an
        `expert_capacity` routing has no groups, so null is as good as any number.
        """
        null = [name for name in ("n_group", "topk_group") if name in f.config and not f.has(name)]
        if not null:
            return f.positive("n_group", 8), f.positive("topk_group", 4)
        if not f.has("expert_capacity"):
            raise f.refuse(f"{null[0]} is null, with which the reference does not run; give n_group and topk_group as "
                           "trained (LLaDA2.0 has 8 and 4), or 1 and 1 for no limit by groups")
        return 1, 1

    def layout(self, description: ModelDescription) -> Layout:
        """The names of its tensors."""
        return self._layout


LLADA2_MOE = Llada2Moe()
