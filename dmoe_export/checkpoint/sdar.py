"""Families `sdar` and `sdar_moe`: SDAR-1.7B, -4B, -8B and -30B-A3B (arXiv 2510.06303), a Qwen3 trunk in blocks.

Both classes share fields and names but for the feed-forward: which layers hold experts is said as in Qwen3-MoE.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..description import ModelDescription, MoeDescription
from .config_fields import MOST_LAYERS, MOST_POSITIONS, Fields, shown
from .layout import Layout, below, split_qkv, swiglu, weights
from .rope import whole_heads

_PUBLISHED = 151936, 151669, 151643  # vocabulary, mask, EOS; generation_config.json adds <|im_end|>, which ends answers

# Fields that must be there: the default of Qwen3's and Qwen3-MoE's configuration classes, and what published files say.
# Shared, and filled in: rms_norm_eps 1e-6, tie_word_embeddings false, decoder_sparse_step 1, mlp_only_layers [].
_STATED: dict[str, tuple[Any, Any]] = {
    "rope_theta": (10000.0, 1000000), "head_dim": (128, 128), "num_key_value_heads": (32, "8, of 30B-A3B 4"),
    "norm_topk_prob": (False, True)}

# Read by export/routing.py; or of no meaning while sliding windows are off.
_ELSEWHERE = ("block_size", "sliding_window", "max_window_layers")


class Sdar:
    """Reads config.json and names the tensors of a dense SDAR checkpoint."""

    name = model_type = "sdar"
    architectures: tuple[str, ...] = ("SDARForCausalLM",)
    block_length, block_in_name = 4, True

    def describe(self, config: dict[str, Any], source: Path) -> ModelDescription:
        """The description; unsupported or contradictory fields are errors."""
        f = Fields(config, source, defaults=_STATED)
        f.only("hidden_act", ("silu",))
        for name in ("attention_bias", "use_sliding_window"):
            f.only(name, (False,))
        vocab, layers = f.positive("vocab_size"), f.positive("num_hidden_layers", most=MOST_LAYERS)
        heads, kv_heads, head_dim = map(f.positive, ("num_attention_heads", "num_key_value_heads", "head_dim"))
        if heads % kv_heads:
            raise f.refuse(f"num_key_value_heads {kv_heads} does not divide num_attention_heads {heads}")
        theta, rotary = whole_heads(f, head_dim)
        moe = self._moe(f, layers)
        description = ModelDescription(
            family=self.name, architecture=self.architectures[0], vocab_size=vocab,
            hidden_size=f.positive("hidden_size"), num_layers=layers, num_heads=heads, num_kv_heads=kv_heads,
            head_dim=head_dim, moe=moe,
            dense_width=f.positive("intermediate_size") if moe is None or moe.first_dense_layers else 0,
            qk_norm=True, rope_theta=theta, rotary_dim=rotary, rms_eps=f.get("rms_norm_eps", float, 1e-6),
            max_positions=f.positive("max_position_embeddings", most=MOST_POSITIONS),
            tie_embeddings=f.get("tie_word_embeddings", bool, False), **f.ids(vocab, _PUBLISHED))
        f.refuse_unread((*_ELSEWHERE, "intermediate_size"))  # of dense layers, of which there may be none
        return description

    def _moe(self, f: Fields, layers: int) -> MoeDescription | None:
        return None

    def layout(self, description: ModelDescription) -> Layout:
        """The names of its tensors."""
        return Layout(
            family=self.name, layer_prefix="model.layers.{}.",
            outer=weights(embed="model.embed_tokens", norm="model.norm", lm_head="lm_head"),
            layer={**weights(attention_norm="input_layernorm", ffn_norm="post_attention_layernorm"),
                   **split_qkv("self_attn.", bias=False),
                   **below("attention.", weights(q_norm="self_attn.q_norm", k_norm="self_attn.k_norm",
                                                 out="self_attn.o_proj"))},
            dense_ffn=below("ffn.", swiglu("mlp")), router=below("ffn.", weights(router="mlp.gate")))


class SdarMoe(Sdar):
    """The same with experts."""

    name = model_type = "sdar_moe"
    architectures = ("SDARMoeForCausalLM",)

    def _moe(self, f: Fields, layers: int) -> MoeDescription:
        experts, k = f.positive("num_experts"), f.positive("num_experts_per_tok")
        if k > experts:
            raise f.refuse(f"num_experts_per_tok {k} exceeds num_experts {experts}")
        return MoeDescription(
            num_experts=experts, experts_per_token=k, expert_width=f.positive("moe_intermediate_size"),
            shared_width=0, num_groups=1, groups_kept=1, routed_scaling=1.0, score_function="softmax",
            renormalise=f.get("norm_topk_prob", bool), expert_bias=False,
            first_dense_layers=self._dense_layers(f, layers))

    def _dense_layers(self, f: Fields, layers: int) -> int:
        """How many layers come before the first with experts; any other pattern is refused."""
        step = f.positive("decoder_sparse_step", 1)
        listed = f.config["mlp_only_layers"] if f.has("mlp_only_layers") else []
        if not isinstance(listed, list) or not all(type(one) is int and 0 <= one < layers for one in listed):
            raise f.refuse(f"mlp_only_layers is {shown(listed)}, expected a list of layers below {layers}")
        dense = [layer for layer in range(layers) if layer in listed or (layer + 1) % step]
        if dense != list(range(len(dense))) or len(dense) == layers:
            raise f.refuse(f"mlp_only_layers {shown(listed)} and decoder_sparse_step {step} make layers "
                           f"{shown(dense)} dense, which is not supported (supported: none, or the first ones)")
        return len(dense)


SDAR, SDAR_MOE = Sdar(), SdarMoe()
