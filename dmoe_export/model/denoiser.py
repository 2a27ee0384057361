"""The denoiser: one forward for prefill, denoise and commit (architecture.md, "One graph")."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..description import ModelDescription, RoutingDescription
from ..ops.head.eager import wanted
from ..weight_formats import ExpertQuantisation
from .attention import Attention
from .layers import AddNorm, FeedForward, rotary_angles
from .moe import MoE, RoutingSettings


class Past(NamedTuple):
    """Cached rows: per layer key and value [B,Hkv,S,D]; positions [B,S], −1 = empty. S ≥ 1."""

    keys: list[Tensor]
    values: list[Tensor]
    positions: Tensor


class DenoiserOutput(NamedTuple):
    """Results of one forward. M = tokens whose vocabulary row was asked for."""

    logits: Tensor  # [B, M, V] float32
    keys: list[Tensor]  # per layer [B, Hkv, T, D], new tokens only
    values: list[Tensor]
    expert_ids: list[Tensor]  # per MoE layer [B, T, k] int32
    router_logits: list[Tensor]  # per MoE layer [B, T, E] float32


class Layer(nn.Module):
    """Pre-norm transformer layer; its feed-forward is dense or a mixture."""

    def __init__(self, d: ModelDescription, routing: RoutingDescription, index: int, dtype: torch.dtype,
                 stored_width: int | None, quantisation: ExpertQuantisation | None = None) -> None:
        super().__init__()
        self.attention_norm = AddNorm(d.hidden_size, d.rms_eps, dtype)
        self.attention = Attention(d, routing.block_length, dtype)
        self.ffn_norm = AddNorm(d.hidden_size, d.rms_eps, dtype)
        self.ffn: FeedForward | MoE = (MoE(d, routing, dtype, stored_width, quantisation) if index in d.moe_layers
                                       else FeedForward(d.hidden_size, d.dense_width, dtype))


class Denoiser(nn.Module):
    """A masked-diffusion transformer rebuilt from its description.

    Rows of logits are never shifted here: where `description.logit_shift` holds, the row of token i − 1 predicts
    position i, and the host asks for that row.
    """

    layer_type: type[nn.Module] = Layer

    def __init__(self, description: ModelDescription, routing: RoutingDescription,
                 dtype: torch.dtype = torch.float32, stored_width: int | None = None,
                 quantisation: ExpertQuantisation | None = None) -> None:
        super().__init__()
        d = self.description = description
        self.routing = routing
        self.dtype, self.quantisation = dtype, quantisation
        self.stored_width = stored_width or (d.moe.expert_width if d.moe else 0)
        self.embed = nn.Embedding(d.vocab_size, d.hidden_size, dtype=dtype)
        self.layers = nn.ModuleList(self.layer_type(d, routing, i, dtype, stored_width, quantisation)
                                    for i in range(d.num_layers))
        self.norm = nn.RMSNorm(d.hidden_size, eps=d.rms_eps, dtype=dtype)
        self.lm_head = nn.Linear(d.hidden_size, d.vocab_size, bias=False, dtype=dtype)
        self.tie()

    def tie(self) -> None:
        """Share the embedding with the vocabulary head where the model does (again, after `to_empty` split them)."""
        if self.description.tie_embeddings:
            self.lm_head.weight = self.embed.weight

    def empty_past(self, rows: int) -> Past:
        """A cache of one empty row, so that no tensor is ever empty."""
        d = self.description
        device = self.embed.weight.device
        zeros = [torch.zeros(rows, heads, 1, width, dtype=self.dtype, device=device) for heads, width in d.cached_heads]
        return Past(zeros, zeros, torch.full((rows, 1), -1, device=device))

    def forward(self, input_ids: Tensor, position_ids: Tensor, past: Past | None = None,
                settings: RoutingSettings | None = None, logit_rows: Tensor | None = None,
                attention_positions: Tensor | None = None) -> DenoiserOutput:
        """One forward over input_ids, position_ids [B,T] (−1 = padding).

        `logit_rows [B,M]` names the tokens (indices into T) whose logits are wanted, all of them by default.
        `attention_positions`: see `trunk`.
        """
        x, out = self.trunk(input_ids, position_ids, past, settings, attention_positions)
        return out._replace(logits=self.logits(x, logit_rows, input_ids))

    def logits(self, x: Tensor, logit_rows: Tensor | None, input_ids: Tensor) -> Tensor:
        """Logits [B,M,V] in float32 of the residual stream [N,H]."""
        rows, tokens = input_ids.shape
        if logit_rows is None:
            logit_rows = torch.arange(tokens, device=x.device).expand(rows, tokens)
        logits = self.lm_head(self.norm(wanted(x, logit_rows, tokens))).float()
        return logits.reshape(rows, logit_rows.shape[1], self.description.vocab_size)

    def trunk(self, input_ids: Tensor, position_ids: Tensor, past: Past | None = None,
              settings: RoutingSettings | None = None, attention_positions: Tensor | None = None
              ) -> tuple[Tensor, DenoiserOutput]:
        """The residual stream [N,H] after the last layer, N = B·T, and the output but for its logits.

        `attention_positions` [B,T]: where the tokens stand for the block-causal mask alone, so that blocks may see one
        another that are open together; None: where they are.
        """
        d = self.description
        seen_at = position_ids if attention_positions is None else attention_positions
        past = past or self.empty_past(len(input_ids))
        settings = settings or RoutingSettings.of(self.routing)
        angles = rotary_angles(position_ids, d.rope_theta, d.rotary_dim, torch.float32)
        out = DenoiserOutput(input_ids, [], [], [], [])
        x = self.embed(input_ids.flatten())  # [N, H]: products of two dimensions take weights as stored
        mixed = None
        for layer, past_key, past_value in zip(self.layers, past.keys, past.values, strict=True):
            x, h = layer.attention_norm(x, mixed)
            attended, key, value = layer.attention(h, angles, (seen_at, past.positions), past_key, past_value)
            x, h = layer.ffn_norm(x, attended)
            if isinstance(layer.ffn, MoE):
                mixed, ids, router_logits = layer.ffn(h, position_ids, settings)
                out.expert_ids.append(ids)
                out.router_logits.append(router_logits)
            else:
                mixed = layer.ffn(h)
            out.keys.append(key)
            out.values.append(value)
        return x if mixed is None else x + mixed, out
