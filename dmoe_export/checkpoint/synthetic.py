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
from .llada2_moe import LLADA2_MOE, dense_tensors

_LLADA2 = {
    "architectures": ["LLaDA2MoeModelLM"], "model_type": "llada2_moe", "hidden_act": "silu", "use_qk_norm": True,
    "use_bias": False, "use_qkv_bias": False, "rope_scaling": None, "score_function": "sigmoid",
    "partial_rotary_factor": 0.5, "rope_theta": 600000.0, "rms_norm_eps": 1e-6, "norm_topk_prob": True,
    "tie_word_embeddings": False, "num_shared_experts": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5,
}
# Sizes of spec models.md; "tiny" is for tests.
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
    "tiny": _LLADA2 | {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 16,
        "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 4, "topk_group": 2,
        "max_position_embeddings": 256, "pad_token_id": 94, "eos_token_id": 94, "mask_token_id": 95},
}


def write_synthetic(folder: Path, config: dict[str, Any], *, seed: int = 0, dtype: torch.dtype = torch.float32,
                    merged: bool = False, shard_bytes: int = 2 << 30) -> None:
    """Write config.json and seeded random safetensors shards.

    `merged` stores experts as `mlp.experts.{part}_proj [E, …]`. Shards close when they pass `shard_bytes`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    description = LLADA2_MOE.describe(config, folder / "config.json")
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

    for name, shape in _tensors(description, merged):
        shards[0][name] = _random(name, shape, dtype, generator)
        held += shards[0][name].nbytes
        if held >= shard_bytes:
            flush()
    if shards[0]:
        flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def _tensors(d: ModelDescription, merged: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from dense_tensors(d).values()
    moe = d.moe
    shapes = {"gate": (moe.expert_width, d.hidden_size), "up": (moe.expert_width, d.hidden_size),
              "down": (d.hidden_size, moe.expert_width)}
    for layer in d.moe_layers:
        base = f"model.layers.{layer}.mlp.experts"
        for part, shape in shapes.items():
            if merged:
                yield f"{base}.{part}_proj", (moe.num_experts, *shape)
            else:
                yield from ((f"{base}.{e}.{part}_proj.weight", shape) for e in range(moe.num_experts))


def _random(name: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if "norm" in name:
        return torch.ones(shape, dtype=dtype)
    if name.endswith("expert_bias"):
        return (0.05 * torch.randn(shape, generator=generator)).to(dtype)
    return torch.randn(shape, generator=generator).mul_(shape[-1] ** -0.5).to(dtype)
