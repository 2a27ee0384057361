"""The traced module of a model with a canvas: the denoiser graph's contract, with phase, conditioning and draws."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..bundle.contract import CANVAS_INPUTS, CANVAS_OUTPUTS
from ..description import RUNTIME_SETTINGS, RoutingMode
from ..model.canvas import Canvas, CanvasDenoiser
from ..model.denoiser import Past
from ..model.moe import RoutingSettings
from ..ops.head.eager import best_tokens
from ..ops.torch_ops import first_rows
from .graph import example_cache


class CanvasGraph(nn.Module):
    """Adds to the denoiser what the host wants: the best token and its probability, draws, expert ids in one tensor."""

    def __init__(self, denoiser: CanvasDenoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, input_ids: Tensor, position_ids: Tensor, past_positions: Tensor, logit_rows: Tensor,
                logits_kept: Tensor, denoise: Tensor, soft_embeddings: Tensor, temperature: Tensor, uniform: Tensor,
                settings: dict[str, Tensor], past_key: list[Tensor], past_value: list[Tensor]) -> tuple[Any, ...]:
        """Token ids [B,M], confidence [B,M], logits [B,L,V]; sampled ids, entropy [B,M], soft embeddings [B,M,H] (see
        `runtime.backend.CanvasInputs`, `CanvasOutputs`); expert ids [L,B,T,k]; keys and values [B,Hkv,T,D] by layer.
        """
        model, fixed = self.denoiser, RoutingSettings.of(self.denoiser.routing)._asdict()
        canvas = Canvas(denoise, soft_embeddings, temperature, uniform)
        x, out = model.trunk(input_ids, position_ids, Past(past_key, past_value, past_positions),
                             RoutingSettings(**{**fixed, **settings}), canvas)
        logits = model.logits(x, logit_rows, input_ids)
        drawn = model.drawn(logits, canvas)  # before what needs the logits themselves, which ONNX Runtime frees so
        best = (*best_tokens(logits, model.description.barred_id), first_rows(logits, logits_kept))
        return *best, *drawn, torch.stack(out.expert_ids), out.keys, out.values


def input_names(mode: RoutingMode, layers: int) -> list[str]:
    """Graph input names, in the order of CanvasGraph.forward."""
    past = [f"past_{part}.{layer}" for part in ("key", "value") for layer in range(layers)]
    return ["input_ids", "position_ids", "past_positions", "logit_rows", "logits_kept", *CANVAS_INPUTS,
            *RUNTIME_SETTINGS[mode], *past]


def output_names(layers: int) -> list[str]:
    """Graph output names."""
    return ["token_ids", "confidence", "logits", *CANVAS_OUTPUTS, "expert_ids",
            *(f"{part}.{layer}" for part in ("key", "value") for layer in range(layers))]


def example_inputs(model: CanvasDenoiser, mode: RoutingMode) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Inputs to trace with, and their dynamic axes (batch B, tokens T, past S, logit_rows M, kept L)."""
    d = model.description
    batch, tokens, past, rows, kept = (torch.export.Dim(name) for name in ("B", "T", "S", "M", "L"))
    b, t, s, m, few = 2, 19, 41, 5, 3
    settings, names = RoutingSettings.of(model.routing)._asdict(), RUNTIME_SETTINGS[mode]
    ids = torch.zeros(b, t, dtype=torch.int64)
    cached, caches = example_cache(model, b, s, batch, past)
    inputs = (ids, ids.clone(), torch.zeros(b, s, dtype=torch.int64), torch.zeros(b, m, dtype=torch.int64),
              torch.arange(few), torch.zeros(b, dtype=torch.bool), torch.zeros(b, t, d.hidden_size), torch.ones(b),
              torch.zeros(b, m), {name: settings[name] for name in names}, *cached)
    axes = ({0: batch, 1: tokens}, {0: batch, 1: tokens}, {0: batch, 1: past}, {0: batch, 1: rows}, {0: kept},
            {0: batch}, {0: batch, 1: tokens}, {0: batch}, {0: batch, 1: rows}, dict.fromkeys(names), *caches)
    return inputs, axes
