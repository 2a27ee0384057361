"""The traced salient step: the contract of the bundle's second graph, in names and shapes (docs/salient.md)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..description import RUNTIME_SETTINGS, ModelDescription, RoutingMode
from ..model.denoiser import Denoiser, Past
from ..model.moe import RoutingSettings
from ..model.salient import Capacity, RangeState, SalientDenoiser
from ..ops.head.eager import best_tokens

PARTS = ("key", "value", "context", "ffn")
"""What a step leaves to the next, per layer."""


class SalientGraph(nn.Module):
    """Adds to the salient step what the host wants: best tokens, expert ids and salient rows in one tensor each."""

    def __init__(self, denoiser: Denoiser, capacity: Capacity) -> None:
        super().__init__()
        self.denoiser = SalientDenoiser(denoiser, capacity)

    def forward(self, input_ids: Tensor, position_ids: Tensor, past_positions: Tensor, logit_rows: Tensor,
                settings: dict[str, Tensor], past_key: list[Tensor], past_value: list[Tensor],
                unmasked: Tensor | None = None, threshold: Tensor | None = None,
                old: list[list[Tensor]] | None = None) -> tuple[Any, ...]:
        """Outputs as named by `output_names`, in its order."""
        capacity = self.denoiser.capacity
        fixed = RoutingSettings.of(self.denoiser.routing)._asdict()
        state = RangeState(*old) if old else None
        out = self.denoiser(input_ids, position_ids, Past(past_key, past_value, past_positions), state, unmasked,
                            threshold, RoutingSettings(**{**fixed, **settings}), logit_rows)
        token_ids, confidence = best_tokens(out.logits, self.denoiser.description.barred_id)
        outputs = [token_ids, confidence, out.logits]
        if out.expert_ids:
            outputs.append(torch.stack(out.expert_ids))
        if capacity != "all":
            outputs.append(torch.stack(out.salient))
        return *outputs, *out.state


def input_names(mode: RoutingMode, layers: int, capacity: Capacity) -> list[str]:
    """Graph input names, in the order of SalientGraph.forward."""
    past = [f"past_{part}.{layer}" for part in ("key", "value") for layer in range(layers)]
    old = [f"range_{part}.{layer}" for part in PARTS for layer in range(layers)]
    sparse = [] if capacity == "all" else ["unmasked", "threshold", *old]
    return ["input_ids", "position_ids", "past_positions", "logit_rows", *RUNTIME_SETTINGS[mode], *past, *sparse]


def output_names(layers: int, experts: bool, capacity: Capacity) -> list[str]:
    """Graph output names; `experts`: some layers have experts."""
    optional = [("expert_ids", experts), ("salient", capacity != "all")]
    return ["token_ids", "confidence", "logits", *(name for name, there in optional if there),
            *(f"{part}.{layer}" for part in PARTS for layer in range(layers))]


def state_shapes(d: ModelDescription, rows: int, tokens: int) -> dict[str, tuple[int, ...]]:
    """Shape of each part of a layer's state."""
    heads = (rows, d.num_kv_heads, tokens, d.head_dim)
    return dict(zip(PARTS, (heads, heads, (rows, tokens, d.num_heads * d.head_dim), (rows, tokens, d.hidden_size)),
                    strict=True))


def example_inputs(model: Denoiser, mode: RoutingMode, capacity: Capacity
                   ) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Inputs to trace with, and their dynamic axes (batch B, tokens T, past S, logit_rows M)."""
    d = model.description
    batch, tokens, past, rows = (torch.export.Dim(name) for name in ("B", "T", "S", "M"))
    b, t, s, m = 2, 67, 41, 5
    settings = RoutingSettings.of(model.routing)._asdict()
    names = RUNTIME_SETTINGS[mode]
    ids = torch.zeros(b, t, dtype=torch.int64)
    cached = [torch.zeros(b, d.num_kv_heads, s, d.head_dim, dtype=model.dtype) for _ in range(d.num_layers)]
    inputs: tuple[Any, ...] = (
        ids, ids.clone(), torch.zeros(b, s, dtype=torch.int64), torch.zeros(b, m, dtype=torch.int64),
        {name: settings[name] for name in names}, cached, [x.clone() for x in cached])
    axes: tuple[Any, ...] = ({0: batch, 1: tokens}, {0: batch, 1: tokens}, {0: batch, 1: past}, {0: batch, 1: rows},
                             dict.fromkeys(names), *[[{0: batch, 2: past}] * d.num_layers] * 2)
    if capacity == "all":
        return inputs, axes
    # A list, not a dictionary by part: torch.onnx takes a last dictionary for keyword arguments.
    old = [[torch.zeros(shape, dtype=model.dtype) for _ in range(d.num_layers)]
           for shape in state_shapes(d, b, t).values()]
    old_axes = [[{0: batch, 2 if part in ("key", "value") else 1: tokens}] * d.num_layers for part in PARTS]
    return ((*inputs, torch.zeros(b, t, dtype=torch.bool), torch.zeros(1), old),
            (*axes, {0: batch, 1: tokens}, {}, old_axes))
