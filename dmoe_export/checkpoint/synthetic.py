"""Random checkpoints of a given geometry, in the exact on-disk format: for tests and benchmarks of size."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..description import ModelDescription
from .family import family_of
from .layout import Layout, dense_tensors, expert_tensors

_LLADA2 = {
    "architectures": ["LLaDA2MoeModelLM"], "model_type": "llada2_moe", "hidden_act": "silu", "use_qk_norm": True,
    "use_bias": False, "use_qkv_bias": False, "rope_scaling": None, "score_function": "sigmoid",
    "partial_rotary_factor": 0.5, "rope_theta": 600000.0, "rms_norm_eps": 1e-6, "norm_topk_prob": True,
    "tie_word_embeddings": False, "num_shared_experts": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5,
}
_DMOE = {"core_threshold": 0.6, "mode": "aggregate"}  # trained with block routing; without them, with token routing
_LLADA = {
    "architectures": ["LLaDAModelLM"], "model_type": "llada", "block_type": "llama", "layer_norm_type": "rms",
    "activation_type": "silu", "rope": True, "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "include_bias": False,
    "include_qkv_bias": False, "weight_tying": False,
}
_DREAM = {
    "architectures": ["DreamModel"], "model_type": "Dream", "hidden_act": "silu", "rope_theta": 1e6,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}
_LLADA_MOE = {
    "architectures": ["LLaDAMoEModelLM"], "model_type": "llada", "hidden_act": "silu", "qk_layernorm": True,
    "rope_theta": 50000.0, "rms_norm_eps": 1e-5, "partial_rotary_factor": 1.0, "norm_topk_prob": False,
    "moe_router_score_function": "softmax", "moe_router_enable_expert_bias": False, "routed_scaling_factor": 1,
    "shared_expert_intermediate_size": None, "tie_word_embeddings": False,
}
_DIFFUSION_GEMMA: dict[str, Any] = {
    "architectures": ["DiffusionGemmaForBlockDiffusion"], "model_type": "diffusion_gemma", "tie_word_embeddings": True}
_DIFFUSION_GEMMA_TEXT = {
    "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "final_logit_softcapping": 30.0, "pad_token_id": 0,
    "eos_token_id": 1, "bos_token_id": 2, "use_bidirectional_attention": "vision", "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6}}}
# Sizes of spec models.md and of the published config.json files; "tiny" ones are for tests.
GEOMETRIES: dict[str, dict[str, Any]] = {
    "llada2.0-mini": _LLADA2 | {
        "vocab_size": 157184, "hidden_size": 2048, "intermediate_size": 5120, "num_hidden_layers": 20,
        "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 256,
        "num_experts_per_tok": 8, "moe_intermediate_size": 512, "n_group": 8, "topk_group": 4,
        "max_position_embeddings": 32768, "pad_token_id": 156892, "eos_token_id": 156892, "mask_token_id": 156895},
    "llada2.0-flash": _LLADA2 | {
        "vocab_size": 157184, "hidden_size": 4096, "intermediate_size": 9216, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 256,
        "num_experts_per_tok": 8, "moe_intermediate_size": 1024, "n_group": 8, "topk_group": 4,
        "max_position_embeddings": 32768, "pad_token_id": 156892, "eos_token_id": 156892, "mask_token_id": 156895},
    "tiny": _LLADA2 | _DMOE | {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 16,
        "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 4, "topk_group": 2,
        "max_position_embeddings": 256, "pad_token_id": 94, "eos_token_id": 94, "mask_token_id": 95},
    "llada-8b": _LLADA | {
        "vocab_size": 126464, "embedding_size": 126464, "d_model": 4096, "n_layers": 32, "n_heads": 32,
        "n_kv_heads": 32, "mlp_hidden_size": 12288, "max_sequence_length": 4096, "mask_token_id": 126336,
        "eos_token_id": 126081, "pad_token_id": 126081},
    "llada-tiny": _LLADA | {
        "vocab_size": 96, "d_model": 32, "n_layers": 2, "n_heads": 4, "mlp_hidden_size": 48,
        "max_sequence_length": 256, "mask_token_id": 95, "eos_token_id": 94},
    "dream-7b": _DREAM | {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 131072,
        "mask_token_id": 151666, "eos_token_id": 151643, "pad_token_id": 151643},
    "dream-tiny": _DREAM | {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "mask_token_id": 95,
        "eos_token_id": 94},
    "llada-moe-7b": _LLADA_MOE | {
        "vocab_size": 157184, "hidden_size": 2048, "dense_intermediate_size": 8192, "expert_intermediate_size": 1024,
        "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64,
        "num_experts_per_tok": 8, "moe_layer_freq": [1] * 16, "max_position_embeddings": 8192,
        "mask_token_id": 156895, "eos_token_id": 156892, "pad_token_id": 156892},
    "llada-moe-tiny": _LLADA_MOE | {
        "vocab_size": 96, "hidden_size": 32, "expert_intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "num_experts": 16, "num_experts_per_tok": 2,
        "moe_layer_freq": [1, 1], "max_position_embeddings": 256, "mask_token_id": 95, "eos_token_id": 94},
    "diffusion-gemma-26b-a4b": _DIFFUSION_GEMMA | {
        "canvas_length": 256, "eos_token_id": [1, 106], "text_config": _DIFFUSION_GEMMA_TEXT | {
            "vocab_size": 262144, "hidden_size": 2816, "intermediate_size": 2112, "num_hidden_layers": 30,
            "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 5, "num_attention_heads": 16,
            "num_key_value_heads": 8, "head_dim": 256, "num_global_key_value_heads": 2, "global_head_dim": 512,
            "sliding_window": 1024, "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704,
            "max_position_embeddings": 262144}},
    "diffusion-gemma-tiny": _DIFFUSION_GEMMA | {
        "canvas_length": 16, "eos_token_id": [1, 94], "text_config": _DIFFUSION_GEMMA_TEXT | {
            "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 8, "num_global_key_value_heads": 1, "global_head_dim": 16,
            "sliding_window": 8, "num_experts": 16, "top_k_experts": 2, "moe_intermediate_size": 24,
            "max_position_embeddings": 256}},
}

SCALES = ("layer_scalar", "router.scale", "router.per_expert_scale")
"""How names of factors end, which are about 1."""


def dense_llada(layers: int = 8, hidden: int = 1024, vocab: int = 4096, positions: int = 2048) -> dict[str, Any]:
    """config.json of a dense LLaDA of any size: heads of 64, feed-forward 3 × hidden as in LLaDA-8B; for benchmarks."""
    return _LLADA | {"vocab_size": vocab, "d_model": hidden, "n_layers": layers, "n_heads": hidden // 64,
                     "mlp_hidden_size": 3 * hidden, "max_sequence_length": positions, "mask_token_id": vocab - 1,
                     "eos_token_id": vocab - 2}


GEOMETRIES["llada-8x1024"] = dense_llada()  # no published size: small enough for every type side by side


def write_synthetic(folder: Path, config: dict[str, Any], *, seed: int = 0, dtype: torch.dtype = torch.float32,
                    merged: bool = False, shard_bytes: int = 2 << 30) -> None:
    """Write config.json and seeded random safetensors shards.

    `merged` stores experts as `mlp.experts.{part}_proj [E, …]`. Shards close when they pass `shard_bytes`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    family = family_of(config, folder / "config.json")
    description = family.describe(config, folder / "config.json")
    generator = torch.Generator().manual_seed(seed)
    shards: list[dict[str, Tensor]] = [{}]
    weight_map: dict[str, str] = {}
    number, held = 1, 0

    def flush() -> None:
        nonlocal number, held
        name = f"model-{number:05d}.safetensors"
        save_file(shards[0], folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shards[0], name))
        shards[0], number, held = {}, number + 1, 0

    for name, shape in _tensors(description, family.layout(description), merged):
        shards[0][name] = _random(name, shape, dtype, generator)
        held += shards[0][name].nbytes
        if held >= shard_bytes:
            flush()
    if shards[0]:
        flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def _tensors(d: ModelDescription, layout: Layout, merged: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    for tensors in dense_tensors(d, layout).values():
        yield from tensors.items()
    yield from expert_tensors(d, layout, merged)


def _random(name: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if "norm" in name or name.endswith("ln_f.weight"):
        return torch.ones(shape, dtype=dtype)
    if name.endswith(SCALES):
        return (1 + 0.1 * torch.randn(shape, generator=generator)).to(dtype)
    if name.endswith("bias"):
        return (0.05 * torch.randn(shape, generator=generator)).to(dtype)
    return torch.randn(shape, generator=generator).mul_(shape[-1] ** -0.5).to(dtype)
