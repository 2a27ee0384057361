"""The traced module: the contract of the denoiser graph, in names and shapes (architecture.md, "One graph")."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..description import RUNTIME_SETTINGS, RoutingMode
from ..model.denoiser import Denoiser, Past
from ..model.moe import RoutingSettings


class DenoiserGraph(nn.Module):
    """Adds to the denoiser what the host wants: the best token and its probability, expert ids in one tensor if any."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, input_ids: Tensor, position_ids: Tensor, past_positions: Tensor, logit_rows: Tensor,
                settings: dict[str, Tensor], past_key: list[Tensor], past_value: list[Tensor]) -> tuple[Any, ...]:
        """Token ids [B,M], confidence [B,M], logits [B,M,V], expert ids [L,B,T,k], keys and values [B,Hkv,T,D].

        A dense model has no expert ids.
        """
        fixed = RoutingSettings.of(self.denoiser.routing)._asdict()
        out = self.denoiser(input_ids, position_ids, Past(past_key, past_value, past_positions),
                            RoutingSettings(**{**fixed, **settings}), logit_rows)
        token_ids, confidence = best_tokens(out.logits, self.denoiser.description.mask_id)
        ids = (torch.stack(out.expert_ids),) if out.expert_ids else ()
        return token_ids, confidence, out.logits, *ids, out.keys, out.values


def best_tokens(logits: Tensor, mask_id: int) -> tuple[Tensor, Tensor]:
    """Best token [B,M] and its probability [B,M] from logits [B,M,V]; the mask token is never an answer."""
    # A bias made of V values and added: choosing between M·V values would cost ONNX Runtime ten times as much.
    allowed = logits + torch.where(torch.arange(logits.shape[-1]) == mask_id, float("-inf"), 0.0)
    best, token_ids = allowed.max(dim=-1)
    return token_ids, 1.0 / torch.exp(allowed - best[..., None]).sum(-1)


def input_names(mode: RoutingMode, layers: int) -> list[str]:
    """Graph input names, in the order of DenoiserGraph.forward."""
    past = [f"past_{part}.{layer}" for part in ("key", "value") for layer in range(layers)]
    return ["input_ids", "position_ids", "past_positions", "logit_rows", *RUNTIME_SETTINGS[mode], *past]


def output_names(layers: int, experts: bool) -> list[str]:
    """Graph output names; `experts`: some layers have experts."""
    return ["token_ids", "confidence", "logits", *(["expert_ids"] if experts else []),
            *(f"{part}.{layer}" for part in ("key", "value") for layer in range(layers))]


def example_inputs(model: Denoiser, mode: RoutingMode) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Inputs to trace with, and their dynamic axes (batch B, tokens T, past S, logit_rows M)."""
    d = model.description
    batch, tokens, past, rows = (torch.export.Dim(name) for name in ("B", "T", "S", "M"))
    b, t, s, m = 2, 2 * model.routing.block_length + 3, 41, 5
    settings = RoutingSettings.of(model.routing)._asdict()
    names = RUNTIME_SETTINGS[mode]

    def cache() -> list[Tensor]:
        return [torch.zeros(b, d.num_kv_heads, s, d.head_dim, dtype=model.dtype) for _ in range(d.num_layers)]

    ids = torch.zeros(b, t, dtype=torch.int64)
    inputs = (ids, ids.clone(), torch.zeros(b, s, dtype=torch.int64), torch.zeros(b, m, dtype=torch.int64),
              {name: settings[name] for name in names}, cache(), cache())
    cached = [{0: batch, 2: past}] * d.num_layers
    axes = ({0: batch, 1: tokens}, {0: batch, 1: tokens}, {0: batch, 1: past}, {0: batch, 1: rows},
            dict.fromkeys(names), cached, cached)
    return inputs, axes
