"""Family `dream`: Dream-7B (arXiv 2508.15487; class DreamModel), a Qwen2.5 trunk that looks both ways.

Its logits are shifted: the row of position i − 1 predicts position i.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..description import ModelDescription
from .config_fields import MOST_LAYERS, MOST_POSITIONS, Fields
from .layout import Layout, below, split_qkv, swiglu, weights
from .rope import whole_heads

_PUBLISHED = 152064, 151666, 151643  # vocabulary, mask, EOS

# Fields that must be there: the default of the reference's DreamConfig (configuration_dream.py of the hub), and what
# the published file says instead. Shared, and filled in: rms_norm_eps 1e-6, tie_word_embeddings false.
_STATED: dict[str, tuple[Any, Any]] = {"rope_theta": (10000.0, 1000000.0)}

_WITHOUT_MEANING = frozenset(("sliding_window", "max_window_layers"))  # while use_sliding_window is false


class Dream:
    """Reads config.json and names the tensors of a Dream checkpoint."""

    name, model_type = "dream", "Dream"
    architectures = ("DreamModel",)
    block_length, block_in_name = 32, False
    _layout = Layout(
        family=name, layer_prefix="model.layers.{}.",
        outer=weights(embed="model.embed_tokens", norm="model.norm", lm_head="lm_head"),
        layer={**weights(attention_norm="input_layernorm", ffn_norm="post_attention_layernorm"),
               **split_qkv("self_attn.", bias=True), **below("attention.", weights(out="self_attn.o_proj"))},
        dense_ffn=below("ffn.", swiglu("mlp")))

    def describe(self, config: dict[str, Any], source: Path) -> ModelDescription:
        """The description; unsupported or contradictory fields are errors."""
        f = Fields(config, source, defaults=_STATED)
        f.only("hidden_act", ("silu",))
        f.only("use_mrope", (False,))
        f.only("attention_bias", (True,))  # the reference's q, k and v always have one
        f.only("mlp_bias", (False,))
        f.only("full_attn_mask", (True,))
        f.only("use_sliding_window", (False,))
        vocab, heads = f.positive("vocab_size"), f.heads("hidden_size", "num_attention_heads", "num_key_value_heads")
        theta, rotary = whole_heads(f, heads["head_dim"])
        description = ModelDescription(
            family=self.name, architecture=self.architectures[0], vocab_size=vocab,
            hidden_size=f.positive("hidden_size"), **heads,
            num_layers=f.positive("num_hidden_layers", most=MOST_LAYERS),
            dense_width=f.positive("intermediate_size"), moe=None, qk_norm=False,
            rope_theta=theta, rotary_dim=rotary,
            rms_eps=f.get("rms_norm_eps", float, 1e-6),
            max_positions=f.positive("max_position_embeddings", most=MOST_POSITIONS),
            tie_embeddings=f.get("tie_word_embeddings", bool, False), attention="full", logit_shift=True,
            qkv_bias=True, **f.ids(vocab, _PUBLISHED))
        f.refuse_unread(_WITHOUT_MEANING)
        return description

    def layout(self, description: ModelDescription) -> Layout:
        """The names of its tensors."""
        return self._layout


DREAM = Dream()
