"""Salient-token decoding (DyLLM, arXiv 2603.08026): a denoise step that recomputes only the rows that changed.

From step to step most rows of a range of tokens get nearly the same attention context C = softmax(QKᵀ)·V. A row whose
cosine with its C of the previous step falls below a threshold is *salient*: its feed-forward is recomputed in this
layer, its key, value and exact attention in the next. All other rows keep key, value and feed-forward output, and their
C moves by what the recomputed values change. Rows whose token changed enter layer 0.

The module holds no parameters of its own: it shares those of a `Denoiser`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.self_attention.eager import attention_bias, rotate
from .attention import Attention
from .denoiser import Denoiser, Layer, Past
from .layers import rotary_angles
from .moe import MoE, RoutingSettings
from .salient_rows import AllRows, Rows, SomeRows, firsts

Capacity = int | Literal["any", "all"]
"""Rows of a sequence that a layer can recompute: M, as many as are salient, or always all of them (a dense step)."""


class RangeState(NamedTuple):
    """What a step leaves to the next, per layer, of the T tokens of the range."""

    keys: list[Tensor]  # [B, Hkv, T, D]
    values: list[Tensor]
    contexts: list[Tensor]  # [B, T, Hq·D], before the output projection
    ffns: list[Tensor]  # [B, T, H], routed and shared experts together


class SalientOutput(NamedTuple):
    """Results of one step. M = tokens whose vocabulary row was asked for."""

    logits: Tensor  # [B, M, V] float32
    expert_ids: list[Tensor]  # per MoE layer [B, T, k] int32; −1 = row not recomputed
    salient: list[Tensor]  # per layer [B, T] bool: rows below the threshold, also those beyond the capacity
    state: RangeState


class SalientAttention(nn.Module):
    """Attention in which keys, values and exact contexts are recomputed for some rows."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = attention.heads, attention.kv_heads, attention.head_dim
        split = self.heads * self.head_dim
        self.q = _outputs(attention.qkv, 0, split)
        self.kv = _outputs(attention.qkv, split, attention.qkv.out_features)
        self.q_norm, self.k_norm, self.out = attention.q_norm, attention.k_norm, attention.out

    def forward(self, x: Tensor, rows: Rows, angles: tuple[Tensor, Tensor], bias: Tensor,
                past: tuple[Tensor, Tensor], old: tuple[Tensor, Tensor, Tensor] | None
                ) -> tuple[Tensor, Tensor, Tensor]:
        """x [N,H], bias [B,1,1,T or 1,S+T], past key and value [B,Hkv,S,D], old key, value and context of the range.

        Returns the new key, value [B,Hkv,T,D] and context [B,T,Hq·D]. `old` None: `rows` are all rows.
        """
        batch, tokens = angles[0].shape[:2]
        share = self.heads // self.kv_heads
        q = self.q_norm(self.q(x).reshape(batch, tokens, self.heads, self.head_dim))
        q = rotate(q, *angles) * self.head_dim**-0.5
        q = q.unflatten(2, (self.kv_heads, share)).permute(0, 2, 3, 1, 4)  # [B, Hkv, share, T, D]
        q = q.reshape(batch, self.kv_heads, share * tokens, self.head_dim)
        k, v = self.kv(rows.take(x)).split(self.kv_heads * self.head_dim, dim=1)
        heads = (batch, rows.count, self.kv_heads, self.head_dim)
        # Two dimensions for the norm: with more of them torch cannot trace a count that comes from the data.
        k = self.k_norm(k.reshape(batch * rows.count * self.kv_heads, self.head_dim)).reshape(heads)
        k = rotate(k, *rows.take_pair(angles)).transpose(1, 2)  # [B, Hkv, M, D]
        v = v.reshape(heads).transpose(1, 2)
        key = rows.put_heads(old[0], k) if old else k
        value = rows.put_heads(old[1], v) if old else v
        scores = torch.cat([q @ past[0].transpose(2, 3), q @ key.transpose(2, 3)], dim=-1)
        scores = scores.unflatten(2, (share, tokens)).float() + bias
        probs = torch.softmax(scores, dim=-1).to(x.dtype).flatten(2, 3)  # [B, Hkv, share·T, S+T]
        cached = past[0].shape[2]
        exact_probs = rows.take_heads(probs, share)  # [B, Hkv, share·M, S+T]
        exact = exact_probs[..., :cached] @ past[1] + exact_probs[..., cached:] @ value
        context = self._joined(exact, rows.count)
        if old is not None:
            # Rows that were not recomputed are zero in the difference: the product needs no gathered columns.
            moved = old[2] + self._joined(probs[..., cached:] @ (value - old[1]), tokens)
            context = rows.put(moved.flatten(0, 1), context.flatten(0, 1)).reshape(moved.shape)
        return key, value, context

    def _joined(self, mixed: Tensor, tokens: int) -> Tensor:
        """[B, Hkv, share·T, D] → [B, T, Hq·D]."""
        share = self.heads // self.kv_heads
        mixed = mixed.unflatten(2, (share, tokens)).permute(0, 3, 1, 2, 4)
        return mixed.reshape(mixed.shape[0], tokens, self.heads * self.head_dim)


class SalientLayer(nn.Module):
    """A layer of the denoiser with its own attention."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm, self.ffn = layer.attention_norm, layer.ffn_norm, layer.ffn
        self.attention = SalientAttention(layer.attention)


class SalientDenoiser(nn.Module):
    """The sparse step of a denoiser; every capacity is the same arithmetic on other shapes."""

    def __init__(self, denoiser: Denoiser, capacity: Capacity = "any") -> None:
        super().__init__()
        self.description, self.routing, self.dtype = denoiser.description, denoiser.routing, denoiser.dtype
        self.quantisation, self.stored_width = denoiser.quantisation, denoiser.stored_width
        self.capacity: Capacity = capacity
        self.embed, self.norm, self.lm_head = denoiser.embed, denoiser.norm, denoiser.lm_head
        self.layers = nn.ModuleList(SalientLayer(layer) for layer in denoiser.layers)

    def forward(self, input_ids: Tensor, position_ids: Tensor, past: Past, old: RangeState | None = None,
                unmasked: Tensor | None = None, threshold: Tensor | None = None,
                settings: RoutingSettings | None = None, logit_rows: Tensor | None = None) -> SalientOutput:
        """One step over the range input_ids, position_ids [B,T] (−1 = padding) against frozen rows outside it.

        `unmasked` [B,T] bool: rows that enter layer 0; `threshold` [1]: τ. All rows and τ > 1 make the step dense and
        exact, whatever `old` holds (finite values); capacity "all" is that step without `old`, `unmasked`, `threshold`.
        Beyond capacity M the lowest cosines are recomputed, and the result is to be thrown away.
        """
        d = self.description
        batch, tokens = input_ids.shape
        settings = settings or RoutingSettings.of(self.routing)
        angles = rotary_angles(position_ids, d.rope_theta, d.rotary_dim, self.dtype)
        keys_at = torch.cat([past.positions, position_ids], dim=1)
        bias = attention_bias(position_ids, keys_at, 0 if d.attention == "full" else self.routing.block_length)
        valid = position_ids >= 0
        least = 1 if d.moe else 0  # ONNX Runtime expands no empty tensors in the routing body: one row that only fills
        rows: Rows = AllRows(batch, tokens)
        if old is not None:
            assert unmasked is not None and threshold is not None
            nothing = torch.zeros_like(position_ids, dtype=torch.float32)
            rows = SomeRows.lowest(unmasked & valid, nothing, self.capacity, least)
        out = SalientOutput(input_ids, [], [], RangeState([], [], [], []))
        x = self.embed(input_ids.flatten())  # [N, H], N = B·T
        for index, layer in enumerate(self.layers):
            before = None if old is None else (old.keys[index], old.values[index], old.contexts[index])
            key, value, context = layer.attention(layer.attention_norm(x)[1], rows, angles, bias,
                                                  (past.keys[index], past.values[index]), before)
            x = x + layer.attention.out(context.flatten(0, 1))
            salient = valid
            if before is not None:
                cosine = F.cosine_similarity(context.float(), before[2].float(), dim=-1)  # [B, T]
                salient = (cosine < threshold) & valid
                rows = SomeRows.lowest(salient, cosine, self.capacity, least)
            _, h = layer.ffn_norm(rows.take(x))
            if isinstance(layer.ffn, MoE):
                mixed, ids, _ = layer.ffn(h, rows.take_positions(position_ids), settings)
                out.expert_ids.append(rows.put_ids(ids, tokens))
            else:
                mixed = layer.ffn(h)
            ffn = mixed if old is None else rows.put(old.ffns[index].flatten(0, 1), mixed)  # [N, H]
            x = x + ffn
            out.salient.append(salient)
            for kept, new in zip(out.state, (key, value, context, ffn.reshape(batch, tokens, d.hidden_size)),
                                 strict=True):
                kept.append(new)
        if logit_rows is None:
            logit_rows = torch.arange(tokens, device=x.device).expand(batch, tokens)
        x = x[(firsts(batch, tokens, x.device) + logit_rows.clamp(min=0)).flatten()]
        logits = F.linear(self.norm(x), self.lm_head.weight).float()
        return out._replace(logits=logits.reshape(batch, logit_rows.shape[1], d.vocab_size))


def _outputs(linear: nn.Linear, start: int, stop: int) -> nn.Linear:
    """Some of a linear layer's outputs, in the same memory."""
    part = nn.Linear(linear.in_features, stop - start, bias=linear.bias is not None, device="meta")
    part.weight = nn.Parameter(linear.weight.detach()[start:stop])
    if linear.bias is not None:
        part.bias = nn.Parameter(linear.bias.detach()[start:stop])
    return part
