"""Writes the trained denoiser as a LLaDA2-MoE checkpoint of Hugging Face form."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from dmoe_export.checkpoint.llada2_moe import dense_tensors
from dmoe_export.description import ModelDescription, MoeDescription, RoutingDescription
from dmoe_export.model.denoiser import Denoiser


def describe(vocab_size: int, eos_id: int, mask_id: int) -> tuple[ModelDescription, RoutingDescription]:
    """The sample model: 2.8 M parameters, most of them in 3 × 32 experts."""
    moe = MoeDescription(num_experts=32, experts_per_token=4, expert_width=64, shared_width=64, num_groups=4,
                         groups_kept=2, routed_scaling=2.5, first_dense_layers=1)
    model = ModelDescription(family="llada2_moe", architecture="LLaDA2MoeModelLM", vocab_size=vocab_size,
                             hidden_size=128, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=32, dense_width=384,
                             moe=moe, qk_norm=True, rope_theta=10_000.0, rotary_dim=16, rms_eps=1e-6,
                             max_positions=512, tie_embeddings=False, mask_id=mask_id, eos_ids=(eos_id,), pad_id=eos_id)
    return model, RoutingDescription.default(moe)


def config(d: ModelDescription, routing: RoutingDescription) -> dict[str, object]:
    """config.json with the field names of LLaDA2-MoE."""
    moe = d.moe
    return {
        "architectures": [d.architecture], "model_type": d.family, "torch_dtype": "bfloat16",
        "vocab_size": d.vocab_size, "hidden_size": d.hidden_size, "intermediate_size": d.dense_width,
        "num_hidden_layers": d.num_layers, "num_attention_heads": d.num_heads, "num_key_value_heads": d.num_kv_heads,
        "head_dim": d.head_dim, "hidden_act": "silu", "num_experts": moe.num_experts,
        "num_shared_experts": moe.shared_width // moe.expert_width, "num_experts_per_tok": moe.experts_per_token,
        "n_group": moe.num_groups, "topk_group": moe.groups_kept, "routed_scaling_factor": moe.routed_scaling,
        "moe_intermediate_size": moe.expert_width, "first_k_dense_replace": moe.first_dense_layers,
        "use_qk_norm": d.qk_norm, "use_qkv_bias": False, "use_bias": False,
        "max_position_embeddings": d.max_positions, "rope_theta": d.rope_theta, "rope_scaling": None,
        "partial_rotary_factor": d.rotary_dim / d.head_dim, "rms_norm_eps": d.rms_eps,
        "norm_topk_prob": moe.renormalise, "score_function": moe.score_function,
        "tie_word_embeddings": d.tie_embeddings, "core_threshold": routing.top_p, "mode": "aggregate",
        "pad_token_id": d.pad_id, "eos_token_id": d.eos_id, "mask_token_id": d.mask_id,
    }


def round_to_saved_precision(model: Denoiser) -> None:
    """Round the weights as the checkpoint stores them: bfloat16, but routers in float32."""
    for name, parameter in model.named_parameters():
        if ".router." not in name:
            parameter.data = parameter.data.bfloat16().to(parameter.dtype)


def tensors(model: Denoiser) -> dict[str, Tensor]:
    """The weights under the names of LLaDA2-MoE, in the precision of the checkpoint."""
    d, parameters = model.description, dict(model.named_parameters())
    found = {theirs: parameters[ours] for ours, (theirs, _) in dense_tensors(d).items()}
    for layer in d.moe_layers:
        slabs = zip(parameters[f"layers.{layer}.ffn.gate_up"], parameters[f"layers.{layer}.ffn.down"], strict=True)
        for expert, (gate_up, down) in enumerate(slabs):
            name = f"model.layers.{layer}.mlp.experts.{expert}"
            found |= {f"{name}.gate_proj.weight": gate_up[0::2], f"{name}.up_proj.weight": gate_up[1::2],
                      f"{name}.down_proj.weight": down}
    return {name: tensor.detach().to(torch.float32 if ".mlp.gate." in name else torch.bfloat16).contiguous().clone()
            for name, tensor in found.items()}


def save_checkpoint(model: Denoiser, routing: RoutingDescription, folder: Path) -> None:
    """Write config.json, generation_config.json and model.safetensors; each replaces the old file in one move."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "model.safetensors.new"
    save_file(tensors(model), weights, metadata={"format": "pt"})
    d = model.description
    texts = {"config.json": config(d, routing),
             "generation_config.json": {"eos_token_id": d.eos_id, "pad_token_id": d.pad_id}}
    for name, fields in texts.items():
        (folder / f"{name}.new").write_text(json.dumps(fields, indent=1) + "\n")
    weights.replace(folder / "model.safetensors")
    for name in texts:
        (folder / f"{name}.new").replace(folder / name)
