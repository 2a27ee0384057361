"""Family `llada2_moe`: LLaDA2.0/2.1-mini, -flash, dMoE-16B (spec models.md; class LLaDA2MoeModelLM)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..description import ModelDescription, MoeDescription
from .config_fields import Fields
from .layout import Layout, below, swiglu, weights

_MASK_ID, _EOS_ID = 156895, 156892  # of the published vocabulary of 157 184


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
        dense_ffn=below("ffn.", swiglu("mlp")), shared_ffn=below("ffn.shared.", swiglu("mlp.shared_experts")),
        router={"ffn.router.weight": ("mlp.gate.weight",), "ffn.router.expert_bias": ("mlp.gate.expert_bias",)})

    def describe(self, config: dict[str, Any], source: Path) -> ModelDescription:
        """The description; unsupported or contradictory fields are errors."""
        f = Fields(config, source)
        f.only("hidden_act", ("silu",))
        f.only("use_bias", (False,))
        f.only("use_qkv_bias", (False,))
        f.only("rope_scaling", ())
        f.only("score_function", ("sigmoid",))
        f.only("moe_router_enable_expert_bias", (True,))
        f.only("use_sliding_window", (False,))
        f.only("norm_head", (False,))
        # Absent fields take the defaults of the reference's LLaDA2MoeConfig.
        vocab = f.positive("vocab_size")
        heads, kv_heads = f.positive("num_attention_heads"), f.positive("num_key_value_heads")
        head_dim = f.positive("head_dim", f.positive("hidden_size") // heads)
        if heads % kv_heads:
            raise f.refuse(f"num_key_value_heads {kv_heads} does not divide num_attention_heads {heads}")
        layers, dense = f.positive("num_hidden_layers"), f.get("first_k_dense_replace", int, 0)
        if not 0 <= dense < layers:
            raise f.refuse(f"first_k_dense_replace {dense} leaves no layer with experts of num_hidden_layers {layers}")
        rotary = int(head_dim * f.get("partial_rotary_factor", float, 0.5))
        if f.get("rotary_dim", int, rotary) != rotary:
            raise f.refuse(f"rotary_dim {config['rotary_dim']} contradicts partial_rotary_factor, which gives {rotary}")
        if not 0 < rotary <= head_dim or rotary % 2:
            raise f.refuse(f"rotary share of {rotary} dims is odd, empty or exceeds head_dim {head_dim}")
        return ModelDescription(
            family=self.name, architecture=self.architectures[0], vocab_size=vocab,
            hidden_size=f.positive("hidden_size"), num_layers=layers, num_heads=heads, num_kv_heads=kv_heads,
            head_dim=head_dim, dense_width=f.positive("intermediate_size"), moe=self._moe(f, dense),
            qk_norm=f.get("use_qk_norm", bool, True), rope_theta=f.get("rope_theta", float, 10000.0),
            rotary_dim=rotary, rms_eps=f.get("rms_norm_eps", float, 1e-5),
            max_positions=f.positive("max_position_embeddings"),
            tie_embeddings=f.get("tie_word_embeddings", bool, False),
            **f.ids(vocab, mask=_MASK_ID, eos=_EOS_ID))

    def _moe(self, f: Fields, dense: int) -> MoeDescription:
        experts, k = f.positive("num_experts"), f.positive("num_experts_per_tok")
        groups, kept = f.positive("n_group", 8), f.positive("topk_group", 4)
        if k > experts:
            raise f.refuse(f"num_experts_per_tok {k} exceeds num_experts {experts}")
        if experts % groups:
            raise f.refuse(f"n_group {groups} does not divide num_experts {experts}")
        if kept > groups:
            raise f.refuse(f"topk_group {kept} exceeds n_group {groups}")
        if k > kept * (experts // groups):
            raise f.refuse(f"num_experts_per_tok {k} exceeds the {kept * (experts // groups)} experts of "
                           f"{kept} kept groups")
        width = f.positive("moe_intermediate_size")
        shared = f.get("num_shared_experts", int, 0) * width
        return MoeDescription(
            num_experts=experts, experts_per_token=k, expert_width=width, shared_width=shared, num_groups=groups,
            groups_kept=kept, routed_scaling=f.get("routed_scaling_factor", float, 2.5),
            renormalise=k > 1,  # the reference leaves a single expert's score as it is
            first_dense_layers=dense)

    def layout(self, description: ModelDescription) -> Layout:
        """The names of its tensors."""
        return self._layout


LLADA2_MOE = Llada2Moe()
