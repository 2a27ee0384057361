"""Family `llada`: the dense LLaDA-8B (arXiv 2502.09992; class LLaDAModelLM, a LLaMA block named as OLMo names it)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..description import ModelDescription
from .config_fields import MOST_LAYERS, MOST_POSITIONS, Fields
from .harmless_fields import words
from .layout import Layout, below, split_qkv, weights
from .rope import whole_heads

_PUBLISHED = 126464, 126336, 126081  # vocabulary, mask, EOS

# Fields that must be there: the default of the reference's ModelConfig (configuration_llada.py of the hub, OLMo's), and
# what the published file says instead; `exactly` below asks for five more. Shared, and filled in: rms_norm_eps 1e-5,
# include_qkv_bias false, mlp_ratio 4 where mlp_hidden_size is null, n_kv_heads = n_heads, embedding_size = vocab_size
# where it is null (absent it is 50304 there; the tensors' shapes tell).
_STATED: dict[str, tuple[Any, Any]] = {"rope_theta": (10000.0, 500000.0), "weight_tying": (True, False)}

# ALiBi and q/k norms are off; mlp_ratio is for models without mlp_hidden_size; the reference reads weight_tying.
_WITHOUT_MEANING = words("alibi_bias_max attention_layer_norm_with_affine mlp_ratio tie_word_embeddings")


class Llada:
    """Reads config.json and names the tensors of a dense LLaDA checkpoint."""

    name = model_type = "llada"
    architectures = ("LLaDAModelLM",)
    block_length, block_in_name = 32, False

    def describe(self, config: dict[str, Any], source: Path) -> ModelDescription:
        """The description; unsupported or contradictory fields are errors."""
        f = Fields(config, source, defaults=_STATED)
        for name, value in (("block_type", "llama"), ("layer_norm_type", "rms"), ("activation_type", "silu"),
                            ("rope", True), ("include_bias", False)):
            f.exactly(name, value)
        for name in ("alibi", "attention_layer_norm", "bias_for_layer_norm", "input_emb_norm", "scale_logits",
                     "multi_query_attention"):
            f.only(name, (False,))
        f.only("layer_norm_with_affine", (True,))
        f.only("rope_full_precision", (True,))
        f.only("block_group_size", (1,))
        f.only("clip_qkv", ())
        vocab, hidden = f.positive("vocab_size"), f.positive("d_model")
        rows = f.positive("embedding_size", vocab)  # of the table and of the head; the reference never cuts them
        if rows < vocab:
            raise f.refuse(f"embedding_size {rows} is less than vocab_size {vocab}")
        heads = f.heads("d_model", "n_heads", "n_kv_heads")
        theta, rotary = whole_heads(f, heads["head_dim"])
        description = ModelDescription(
            family=self.name, architecture=self.architectures[0], vocab_size=rows, hidden_size=hidden,
            num_layers=f.positive("n_layers", most=MOST_LAYERS), **heads, moe=None, qk_norm=False,
            dense_width=f.positive("mlp_hidden_size", f.positive("mlp_ratio", 4) * hidden),
            rope_theta=theta, rotary_dim=rotary,
            rms_eps=f.get("rms_norm_eps", float, 1e-5),
            max_positions=f.positive("max_sequence_length", most=MOST_POSITIONS),
            tie_embeddings=f.get("weight_tying", bool), attention="full",
            qkv_bias=f.get("include_qkv_bias", bool, False), **f.ids(vocab, _PUBLISHED))
        f.refuse_unread(_WITHOUT_MEANING)
        return description

    def layout(self, description: ModelDescription) -> Layout:
        """The names of its tensors."""
        return Layout(
            family=self.name, layer_prefix="model.transformer.blocks.{}.",
            outer=weights(embed="model.transformer.wte", norm="model.transformer.ln_f",
                          lm_head="model.transformer.ff_out"),
            layer={**weights(attention_norm="attn_norm", ffn_norm="ff_norm"), **split_qkv("", description.qkv_bias),
                   **below("attention.", weights(out="attn_out"))},
            dense_ffn=below("ffn.", weights(gate="ff_proj", up="up_proj", down="ff_out")))


LLADA = Llada()
