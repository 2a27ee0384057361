"""Family `diffusion_gemma`: DiffusionGemma (class DiffusionGemmaForBlockDiffusion of transformers 5.13), text alone.

A Gemma 4 trunk with experts beside a dense feed-forward, and one stack for two phases: text is encoded causally, a
canvas of random tokens is denoised. Nearly all weights are shared by the phases and stand under `model.decoder.`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..description import AttentionDescription, CanvasDescription, GlobalAttention, ModelDescription, MoeDescription
from .config_fields import MOST_LAYERS, MOST_POSITIONS, Fields, shown, token_ids
from .layout import Layout, below, split_qkv, swiglu, weights
from .rope import read_rotary_by_kind

_SLIDING, _FULL = "sliding_attention", "full_attention"

# Fields that must be there: the default of the reference's DiffusionGemmaTextConfig, and what the published file says.
# Shared, and filled in: rms_norm_eps 1e-6, final_logit_softcapping 30, tie_word_embeddings true, canvas_length 256.
_STATED: dict[str, tuple[Any, Any]] = {
    "sliding_window": (512, 1024), "num_global_key_value_heads": (None, 2), "global_head_dim": (512, 512),
    "layer_types": ("five sliding, one full, repeated", "the same"), "rope_parameters": ("both kinds", "the same")}
_IMAGES = frozenset(("text_config", "vision_config", "boi_token_id", "eoi_token_id", "image_token_id"))
_OF_GEMMA_4 = frozenset(("vocab_size_per_layer_input",))  # while hidden_size_per_layer_input is 0


class DiffusionGemma:
    """Reads config.json and names the tensors of a DiffusionGemma checkpoint."""

    name, model_type = "diffusion_gemma", "diffusion_gemma"
    architectures = ("DiffusionGemmaForBlockDiffusion",)
    _attention = split_qkv("self_attn.", bias=False)
    _layout = Layout(
        family=name, layer_prefix="model.decoder.layers.{}.",
        outer={**weights(embed="model.decoder.embed_tokens", norm="model.decoder.norm", lm_head="lm_head"),
               **below("conditioning.", weights(norm="model.decoder.self_conditioning.pre_norm")),
               **below("conditioning.ffn.", swiglu("model.decoder.self_conditioning"))},
        layer={**weights(attention_norm="input_layernorm", attention_post_norm="post_attention_layernorm",
                         ffn_post_norm="post_feedforward_layernorm"),
               **_attention, "denoise_scale": ("layer_scalar",),
               **below("attention.", weights(q_norm="self_attn.q_norm", k_norm="self_attn.k_norm",
                                             out="self_attn.o_proj"))},
        # No v_proj there: a value is the key before its norm.
        global_layer={ours: (query, key, key) for ours, (query, key, _) in _attention.items()},
        apart={"encode_scale": ("model.encoder.language_model.layers.{}.layer_scalar",)},
        dense_ffn={}, experts="experts",
        router={**below("ffn.", weights(router="router.proj", dense_norm="pre_feedforward_layernorm",
                                        dense_post_norm="post_feedforward_layernorm_1",
                                        experts_norm="pre_feedforward_layernorm_2",
                                        experts_post_norm="post_feedforward_layernorm_2")),
                "ffn.router.norm": ("router.scale",), "ffn.router.expert_scale": ("router.per_expert_scale",),
                **below("ffn.dense.", swiglu("mlp"))},
        copies=("model.encoder.language_model.", "model.decoder."),
        skipped={"model.encoder.vision_tower.": "vision", "model.encoder.embed_vision.": "vision"})

    def describe(self, config: dict[str, Any], source: Path) -> ModelDescription:
        """The description; unsupported or contradictory fields are errors."""
        top = Fields(config, source)
        if not isinstance(config.get("text_config"), dict):
            raise top.refuse(f"text_config is {shown(config.get('text_config'))}, expected an object")
        f = Fields(config["text_config"], source, "text_config.", defaults=_STATED)
        f.only("hidden_activation", ("gelu_pytorch_tanh",))
        f.only("use_bidirectional_attention", ("vision",))
        for name in ("attention_bias", "use_double_wide_mlp"):
            f.only(name, (False,))
        for name in ("enable_moe_block", "attention_k_eq_v"):
            f.only(name, (True,))
        for name in ("num_kv_shared_layers", "hidden_size_per_layer_input"):
            f.only(name, (0,))
        for place in (top, f):
            place.only("tie_word_embeddings", (True,))
        width = f.positive("intermediate_size")
        description = ModelDescription(
            family=self.name, architecture=self.architectures[0], vocab_size=f.positive("vocab_size"),
            hidden_size=f.positive("hidden_size"), num_heads=f.positive("num_attention_heads"), **self._layers(f),
            dense_width=width, moe=self._moe(f), qk_norm=True, rms_eps=f.get("rms_norm_eps", float, 1e-6),
            max_positions=f.positive("max_position_embeddings", most=MOST_POSITIONS), tie_embeddings=True,
            mask_id=None, **_ids(top, f), attention="canvas",
            canvas=CanvasDescription(length=top.positive("canvas_length", 256), conditioning_width=width),
            attention_scale=1.0, value_norm=True, activation="gelu_tanh", sandwich=True, scaled_embedding=True,
            logit_softcap=_softcap(f))
        f.refuse_unread(_OF_GEMMA_4)
        top.refuse_unread(_IMAGES)
        return description

    def _layers(self, f: Fields) -> dict[str, Any]:
        """What differs by kind of layer."""
        layers = f.positive("num_hidden_layers", most=MOST_LAYERS)
        if not f.has("layer_types"):
            raise f.missing("layer_types")
        kinds = f.config["layer_types"]
        if (not isinstance(kinds, list) or len(kinds) != layers or kinds[-1] != _FULL
                or any(kind not in (_SLIDING, _FULL) for kind in kinds)):
            raise f.refuse(f"text_config.layer_types is {shown(kinds)}, which is not supported (supported: "
                           f"{_SLIDING!r} or {_FULL!r} for each of {layers} layers, the last one {_FULL!r})")
        head, wide = f.positive("head_dim"), f.positive("global_head_dim")
        few = f.positive("num_key_value_heads")
        if "num_global_key_value_heads" not in f.config:
            raise f.missing("num_global_key_value_heads")
        fewer = f.positive("num_global_key_value_heads", few)  # null: as in the other layers
        for name, count in (("num_key_value_heads", few), ("num_global_key_value_heads", fewer)):
            if (heads := f.positive("num_attention_heads")) % count:
                raise f.refuse(f"{name} {count} does not divide num_attention_heads {heads}")
        rotary = read_rotary_by_kind(f, {_SLIDING: head, _FULL: wide})
        theta, turned, spread = rotary[_SLIDING]
        if spread:
            raise f.refuse(f"text_config.rope_parameters.{_SLIDING} is proportional, which is not supported there")
        theta_full, turned_full, spread_full = rotary[_FULL]
        full = AttentionDescription(num_kv_heads=fewer, head_dim=wide, rope_theta=theta_full, rotary_dim=turned_full,
                                    rotary_spread=spread_full)
        where = tuple(layer for layer, kind in enumerate(kinds) if kind == _FULL)
        return {"num_layers": layers, "num_kv_heads": few, "head_dim": head, "rope_theta": theta, "rotary_dim": turned,
                "window": f.positive("sliding_window"), "global_attention": GlobalAttention(layers=where,
                                                                                            attention=full)}

    def _moe(self, f: Fields) -> MoeDescription:
        experts, k = f.positive("num_experts"), f.positive("top_k_experts")
        if k > experts:
            raise f.refuse(f"top_k_experts {k} exceeds num_experts {experts}")
        return MoeDescription(
            num_experts=experts, experts_per_token=k, expert_width=f.positive("moe_intermediate_size"), shared_width=0,
            num_groups=1, groups_kept=1, routed_scaling=1.0, score_function="softmax", renormalise=True,
            expert_bias=False, first_dense_layers=0, expert_scale=True, own_norm=True, beside_dense=True)

    def layout(self, description: ModelDescription) -> Layout:
        """The names of its tensors."""
        return self._layout


def _ids(top: Fields, f: Fields) -> dict[str, Any]:
    """`eos_ids` and `pad_id`: what ends an answer stands at the top, and in text_config the first of it."""
    eos = list(dict.fromkeys(i for place in (top, f) if place.has("eos_token_id")
                             for i in token_ids(place, "eos_token_id")))
    if not eos:
        raise f.missing("eos_token_id")
    pad, vocab = f.get("pad_token_id", int, 0), f.positive("vocab_size")
    for name, value in (("pad_token_id", pad), *(("eos_token_id", i) for i in eos)):
        if not 0 <= value < vocab:
            raise f.refuse(f"{name} {value} is outside the vocabulary of {vocab}")
    return {"eos_ids": tuple(eos), "pad_id": pad}


def _softcap(f: Fields) -> float | None:
    """Absent: the reference's default; null: none."""
    if "final_logit_softcapping" in f.config and not f.has("final_logit_softcapping"):
        return None
    cap = f.get("final_logit_softcapping", float, 30.0)
    if cap <= 0:
        raise f.refuse(f"final_logit_softcapping is {cap}, it must be positive")
    return cap


DIFFUSION_GEMMA = DiffusionGemma()
