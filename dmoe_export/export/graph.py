"""The traced module: the contract of the denoiser graph, in names and shapes (architecture.md, "One graph")."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..bundle.contract import ATTENTION_POSITIONS
from ..description import RUNTIME_SETTINGS, RoutingMode
from ..model.denoiser import Denoiser, Past
from ..model.moe import RoutingSettings
from ..ops.head.eager import best_tokens, wanted
from ..ops.torch_ops import first_rows, head


class DenoiserGraph(nn.Module):
    """Adds to the denoiser what the host wants: the best token and its probability, expert ids in one tensor if any."""

    def __init__(self, denoiser: Denoiser, one_head: bool = True) -> None:
        """`one_head`: the vocabulary head is one op; False: a linear layer that may become integers."""
        super().__init__()
        self.denoiser, self.one_head = denoiser, one_head

    def forward(self, input_ids: Tensor, position_ids: Tensor, past_positions: Tensor, logit_rows: Tensor,
                logits_kept: Tensor, settings: dict[str, Tensor], past_key: list[Tensor],
                past_value: list[Tensor], attention_positions: Tensor | None = None) -> tuple[Any, ...]:
        """Token ids [B,M], confidence [B,M], logits [B,L,V], expert ids [L,B,T,k], keys and values [B,Hkv,T,D].

        A dense model has no expert ids.
        """
        fixed = RoutingSettings.of(self.denoiser.routing)._asdict()
        model = self.denoiser
        x, out = model.trunk(input_ids, position_ids, Past(past_key, past_value, past_positions),
                             RoutingSettings(**{**fixed, **settings}), attention_positions)
        d = model.description
        if self.one_head:
            best = head(x, model.norm.weight, model.lm_head.weight, logit_rows, logits_kept, eps=d.rms_eps,
                        mask_id=d.barred_id)
        else:
            logits = model.lm_head(model.norm(wanted(x, logit_rows, input_ids.shape[1]))).float()
            logits = logits.reshape(*logit_rows.shape, d.vocab_size)
            best = (*best_tokens(logits, d.barred_id), first_rows(logits, logits_kept))
        ids = (torch.stack(out.expert_ids),) if out.expert_ids else ()
        return *best, *ids, out.keys, out.values


def input_names(mode: RoutingMode, layers: int, opens_blocks: bool = False) -> list[str]:
    """Graph input names, in the order of DenoiserGraph.forward; `opens_blocks`: blocks may see one another."""
    past = [f"past_{part}.{layer}" for part in ("key", "value") for layer in range(layers)]
    return ["input_ids", "position_ids", "past_positions", "logit_rows", "logits_kept", *RUNTIME_SETTINGS[mode], *past,
            *([ATTENTION_POSITIONS] if opens_blocks else [])]


def output_names(layers: int, experts: bool) -> list[str]:
    """Graph output names; `experts`: some layers have experts."""
    return ["token_ids", "confidence", "logits", *(["expert_ids"] if experts else []),
            *(f"{part}.{layer}" for part in ("key", "value") for layer in range(layers))]


def example_inputs(model: Denoiser, mode: RoutingMode, opens_blocks: bool = False
                   ) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Inputs to trace with, and their dynamic axes (batch B, tokens T, past S, logit_rows M, kept L)."""
    batch, tokens, past, rows, kept = (torch.export.Dim(name) for name in ("B", "T", "S", "M", "L"))
    b, t, s, m, few = 2, 2 * model.routing.block_length + 3, 41, 5, 3
    settings = RoutingSettings.of(model.routing)._asdict()
    names = RUNTIME_SETTINGS[mode]

    ids = torch.zeros(b, t, dtype=torch.int64)
    cached, caches = example_cache(model, b, s, batch, past)
    inputs = (ids, ids.clone(), torch.zeros(b, s, dtype=torch.int64), torch.zeros(b, m, dtype=torch.int64),
              torch.arange(few), {name: settings[name] for name in names}, *cached)
    axes = ({0: batch, 1: tokens}, {0: batch, 1: tokens}, {0: batch, 1: past}, {0: batch, 1: rows},
            {0: kept}, dict.fromkeys(names), *caches)
    return (*inputs, ids.clone()) if opens_blocks else inputs, (*axes, {0: batch, 1: tokens}) if opens_blocks else axes


def example_cache(model: Denoiser, b: int, s: int, batch: Any, past: Any) -> tuple[Any, Any]:
    """Keys and values by layer, of b rows and s places, and the dynamic axes of both."""

    def cache() -> list[Tensor]:
        return [torch.zeros(b, heads, s, width, dtype=model.dtype) for heads, width in model.description.cached_heads]

    axes = [{0: batch, 2: past}] * model.description.num_layers
    return (cache(), cache()), (axes, axes)
