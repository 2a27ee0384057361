"""A backend that says what a script tells it to, as a real one would: best token, share, candidates, logits."""

from __future__ import annotations

import numpy as np
from toy_backend import ToyCache

from dmoe_export.description import EditTokens, ModelDescription, RoutingDescription
from dmoe_export.runtime.backend import ForwardOutputs, Limits
from dmoe_export.runtime.candidates import best_of


class Scripted:
    """`says(forward, positions [m], ids [m])` → logits [m, V]; forwards that decode count from 0."""

    name = "scripted"

    def __init__(self, says, block_length, vocabulary, mask, eos=(0,), edit_tokens=None, attention="block_causal"):
        self.description = ModelDescription(
            family="toy", architecture="t", vocab_size=vocabulary, hidden_size=4, num_layers=1, num_heads=1,
            num_kv_heads=1, head_dim=4, dense_width=4, moe=None, qk_norm=True, rope_theta=1e4, rotary_dim=4,
            rms_eps=1e-6, max_positions=2000, tie_embeddings=False, mask_id=mask, eos_ids=eos, pad_id=eos[0],
            attention=attention, edit_tokens=edit_tokens and EditTokens(delete=edit_tokens[0], split=edit_tokens[1]))
        self.routing = RoutingDescription.default(None, block_length=block_length)
        self.limits, self.opens_blocks = Limits(), False
        self.says, self.count, self.seen = says, 0, []

    def new_cache(self, rows):
        return ToyCache(rows)

    def forward(self, inputs, cache):
        self.seen.append(inputs)
        rows = np.maximum(inputs.logit_rows, 0)
        positions, ids = (np.take_along_axis(of, rows, 1) for of in (inputs.position_ids, inputs.input_ids))
        decodes = (inputs.logit_rows >= 0).any()
        d = self.description
        logits = (np.stack([self.says(self.count, *of) for of in zip(positions, ids, strict=True)]) if decodes
                  else np.zeros((*rows.shape, d.vocab_size))).astype(np.float32)
        self.count += decodes
        allowed = logits.copy()
        allowed[..., d.mask_id] = -np.inf
        shares = np.exp(allowed - allowed.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        keys = [{p: (int(ids[i]), p) for i, p in enumerate(row) if p >= 0}
                for row, ids in zip(inputs.position_ids.tolist(), inputs.input_ids, strict=True)]
        for mine, cached in zip(keys, cache.rows, strict=True):
            assert not mine.keys() & cached.keys()
        return ForwardOutputs(shares.argmax(-1), shares.max(-1), np.zeros((0, *inputs.input_ids.shape, 0), np.int32),
                              logits if inputs.want_logits else None, keys,
                              best_of(logits, d.mask_id, inputs.candidates) if inputs.candidates else None)
