"""Fill the eager model with a checkpoint's weights (for references and small models; the exporter streams instead)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checkpoint.family import Checkpoint
from ..description import ModelDescription, RoutingDescription
from ..weight_formats import ExpertQuantisation
from .canvas import CanvasDenoiser
from .denoiser import Denoiser


def interleave(gate: Tensor, up: Tensor) -> Tensor:
    """Gate and up rows [I,H] each → [2I,H]: row 2i is gate i, row 2i+1 is up i."""
    return torch.stack([gate, up], dim=1).flatten(0, 1)


def new_denoiser(d: ModelDescription, routing: RoutingDescription, dtype: torch.dtype = torch.float32,
                 stored_width: int | None = None, quantisation: ExpertQuantisation | None = None) -> Denoiser:
    """The eager model that a description asks for, without a checkpoint's weights.

    Requires: the axes that no family has apart from each other are together (`_built`).
    """
    assert _built(d), "no layer is built for these axes together"
    kind = CanvasDenoiser if d.canvas else Denoiser
    return kind(d, routing, dtype, stored_width, quantisation)


def _built(d: ModelDescription) -> bool:
    """Whether `Layer` or `SandwichLayer` is what the description says."""
    moe = d.moe
    beside = [bool(moe and one) for one in (moe and moe.own_norm, moe and moe.expert_scale, moe and moe.beside_dense)]
    if d.canvas:
        plain = not (d.qkv_bias or d.logit_shift or (moe and (moe.shared_width or moe.first_dense_layers)))
        return d.sandwich and d.qk_norm and all(beside) and plain
    others = (d.window, d.global_attention, d.attention_scale, d.logit_softcap, d.value_norm, d.scaled_embedding,
              d.sandwich, d.activation != "silu", *beside)
    return not any(others)


@torch.no_grad()
def load_denoiser(checkpoint: Checkpoint, routing: RoutingDescription, dtype: torch.dtype = torch.float32) -> Denoiser:
    """The eager model of a checkpoint, on the CPU, in evaluation mode."""
    d = checkpoint.description
    with torch.device("meta"):
        model = new_denoiser(d, routing, dtype)
    model = model.to_empty(device="cpu").eval()
    model.tie()
    parameters = dict(model.named_parameters())
    for ours, tensors in checkpoint.weights.dense.items():
        parameters[ours].copy_(torch.cat([checkpoint.reader.read(tensor) for tensor in tensors]))
    for layer in d.moe_layers:
        for expert in range(d.experts.num_experts):
            gate, up = checkpoint.weights.gate_up(layer, expert)
            parameters[f"layers.{layer}.ffn.gate_up"][expert] = interleave(gate, up).to(dtype)
            parameters[f"layers.{layer}.ffn.down"][expert] = checkpoint.weights.down(layer, expert).to(dtype)
    return model
