"""Small models with random weights, and the sparse step of the specification written out row by row."""

from __future__ import annotations

import numpy as np
import torch

from dmoe_export.description import ModelDescription, MoeDescription, RoutingDescription
from dmoe_export.model.denoiser import Denoiser, Past
from dmoe_export.model.layers import rotary_angles
from dmoe_export.model.moe import MoE, RoutingSettings
from dmoe_export.model.salient import RangeState, SalientDenoiser
from dmoe_export.ops.self_attention.eager import attention_bias, rotate

VOCABULARY, MASK = 61, 60


def describe(kind: str) -> ModelDescription:
    """`dense` (full canvas, biases), `moe` (full canvas, softmax router) or `block` (block diffusion, dMoE routing)."""
    moe = None
    if kind != "dense":
        moe = MoeDescription(num_experts=8, experts_per_token=2, expert_width=12, shared_width=8 * (kind == "block"),
                             num_groups=4 if kind == "block" else 1, groups_kept=2 if kind == "block" else 1,
                             routed_scaling=2.5, score_function="sigmoid" if kind == "block" else "softmax",
                             renormalise=kind == "block", expert_bias=kind == "block",
                             first_dense_layers=int(kind == "block"))
    return ModelDescription(
        family="test", architecture="Test", vocab_size=VOCABULARY, hidden_size=32, num_layers=3, num_heads=4,
        num_kv_heads=2, head_dim=8, dense_width=40, moe=moe, qk_norm=kind != "dense", rope_theta=1e4,
        rotary_dim=8 if kind == "dense" else 4, rms_eps=1e-6, max_positions=512, tie_embeddings=False, mask_id=MASK,
        eos_ids=(59,), pad_id=59, attention="block_causal" if kind == "block" else "full", qkv_bias=kind == "dense")


def make_model(kind: str, seed: int = 0) -> Denoiser:
    torch.manual_seed(seed)
    d = describe(kind)
    model = Denoiser(d, RoutingDescription.default(d.moe, "top_p" if kind == "block" else "token", 8)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif "embed" in name or name.endswith("bias"):
                parameter.normal_(std=0.5)
    return model


def no_past(model: Denoiser, rows: int) -> Past:
    return model.empty_past(rows)


def random_ids(seed: int, rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def positions(rows: int, tokens: int, start: int = 0) -> torch.Tensor:
    return torch.arange(start, start + tokens).expand(rows, tokens)


@torch.no_grad()
def fill(model: Denoiser, ids, at, past: Past) -> tuple[torch.Tensor, RangeState]:
    """A dense step."""
    out = SalientDenoiser(model, "all")(ids, at, past)
    return out.logits, out.state


@torch.no_grad()
def by_hand(model: Denoiser, ids, at, past: Past, old: RangeState, unmasked, tau: float
            ) -> tuple[np.ndarray, np.ndarray, RangeState]:
    """Spec salient_tokens.md, "One sparse step", for one sequence [T]: logits, salient [L,T], state."""
    d, tokens = model.description, len(ids)
    split = d.num_heads * d.head_dim
    share = d.num_heads // d.num_kv_heads
    keys_at = torch.cat([past.positions[0], at])
    length = 0 if d.attention == "full" else model.routing.block_length
    bias = attention_bias(at[None], keys_at[None], length)[0, 0, 0].expand(tokens, -1)
    angles = rotary_angles(at[None], d.rope_theta, d.rotary_dim, torch.float32)
    x, entering = model.embed(ids), np.flatnonzero(unmasked)
    salient_rows, state = [], RangeState([], [], [], [])
    for i, layer in enumerate(model.layers):
        a = layer.attention
        qkv = a.qkv(layer.attention_norm(x)[1])
        q = rotate(a.q_norm(qkv[:, :split].reshape(1, tokens, d.num_heads, d.head_dim)), *angles)[0]
        kv = qkv[:, split:].reshape(1, tokens, 2, d.num_kv_heads, d.head_dim)
        k, v = rotate(a.k_norm(kv[:, :, 0]), *angles)[0], kv[0, :, 1]
        key, value = old.keys[i][0].clone(), old.values[i][0].clone()  # [Hkv, T, D]
        difference = torch.zeros(tokens, d.num_kv_heads, d.head_dim)
        for s in entering:
            difference[s] = v[s] - value[:, s]  # before the rows are overwritten
            key[:, s], value[:, s] = k[s], v[s]
        context = old.contexts[i][0].clone()
        for row in range(tokens):
            for head in range(d.num_heads):
                group, place = head // share, slice(head * d.head_dim, (head + 1) * d.head_dim)
                all_keys = torch.cat([past.keys[i][0, group], key[group]])
                p = torch.softmax(all_keys @ q[row, head] * d.head_dim**-0.5 + bias[row], dim=0)
                if row in entering:
                    context[row, place] = p @ torch.cat([past.values[i][0, group], value[group]])
                else:
                    for s in entering:
                        context[row, place] += p[past.positions.shape[1] + s] * difference[s, group]
        cosine = torch.nn.functional.cosine_similarity(context, old.contexts[i][0], dim=-1)
        entering = np.flatnonzero(((cosine < tau) & (at >= 0)).numpy())
        x = x + a.out(context)
        ffn = old.ffns[i][0].clone()
        if len(entering):
            h = layer.ffn_norm(x)[1][entering]
            ffn[entering] = (layer.ffn(h, at[entering][None], RoutingSettings.of(model.routing))[0]
                             if isinstance(layer.ffn, MoE) else layer.ffn(h))
        x = x + ffn
        salient_rows.append(np.isin(np.arange(tokens), entering))
        for kept, new in zip(state, (key, value, context, ffn), strict=True):
            kept.append(new[None])
    return model.lm_head(model.norm(x)).numpy(), np.stack(salient_rows), state
