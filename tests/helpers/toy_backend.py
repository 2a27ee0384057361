"""A denoiser of hashes: what a position predicts depends on exactly what it may see, as deep as the model looks."""

from __future__ import annotations

import zlib

import numpy as np

from dmoe_export.decoding.loop import BlockDiffusion
from dmoe_export.decoding.settings import DecodeSettings
from dmoe_export.description import ModelDescription, RoutingDescription
from dmoe_export.runtime.backend import ForwardOutputs, Limits
from dmoe_export.runtime.candidates import best_of

N, EOS, MASK, VOCAB = 4, 1, 2, 24


class ToyCache:
    """Per row position → (id, what the position had seen when it was computed)."""

    def __init__(self, rows):
        self.rows = [{} for _ in range(rows)]

    def part(self, rows):
        part = ToyCache(0)
        part.rows = [self.rows[row] for row in rows]
        return part

    def commit(self, inputs, outputs, take, rows=None):
        assert inputs.want_keys_values
        for i, mine in enumerate(take):
            row = i if rows is None else rows[i]
            for place in np.flatnonzero(mine):
                position = int(inputs.position_ids[i, place])
                assert position >= 0 and position not in self.rows[row]
                self.rows[row][position] = outputs.keys_values[i][position]

    def clear(self, rows):
        for row in rows:
            self.rows[row] = {}

    def leave(self, row, last):
        self.rows[row], self.rows[last] = self.rows[last], {}

    token_bytes = 10

    def read(self, row, start, stop):
        return {position: self.rows[row][position] for position in range(start, stop)}

    def write(self, row, blocks):
        for block in blocks:
            assert min(block) == len(self.rows[row])
            self.rows[row] |= block


class Toy:
    """Depth 1: keys are tokens, so a cached one is stale only if its token changed. Depth 2: keys are what tokens saw.

    Depth 0 sees nothing but the position. Asserts that no position is a query and cached at once.
    """

    name = "toy"

    def __init__(self, attention="block_causal", shift=False, depth=2, max_tokens=None,
                 step_tokens=None, edit_tokens=None):
        self.description = ModelDescription(
            family="toy", architecture="t", vocab_size=VOCAB, hidden_size=4, num_layers=1, num_heads=1, num_kv_heads=1,
            head_dim=4, dense_width=4, moe=None, qk_norm=True, rope_theta=1e4, rotary_dim=4, rms_eps=1e-6,
            max_positions=2000, tie_embeddings=False, mask_id=MASK, eos_ids=(EOS,), pad_id=EOS, attention=attention,
            logit_shift=shift, edit_tokens=edit_tokens)
        self.routing = RoutingDescription.default(None, block_length=N)
        self.limits = Limits(max_tokens=max_tokens, step_tokens=step_tokens)
        self.opens_blocks = attention == "block_causal"
        self.depth, self.seen = depth, []

    def new_cache(self, rows):
        return ToyCache(rows)

    def forward(self, inputs, cache):
        self.seen.append(inputs)
        shape = inputs.logit_rows.shape
        logits, keys_values = np.zeros((*shape, VOCAB), np.float32), []
        for row, positions in enumerate(inputs.position_ids.tolist()):
            keys = {p: (int(inputs.input_ids[row, i]), 0) for i, p in enumerate(positions) if p >= 0}
            assert not keys.keys() & cache.rows[row].keys()
            seen_at = inputs.attention_positions
            at = {} if seen_at is None else dict(zip(positions, seen_at[row].tolist(), strict=True))
            keys_values.append({p: (token, self._hash(p, keys | cache.rows[row], 0, at))
                                for p, (token, _) in keys.items()})
            keys = keys_values[-1] | cache.rows[row]
            for m, place in enumerate(inputs.logit_rows[row].tolist()):
                if place >= 0:
                    assert positions[place] >= 0
                    seed = self._hash(positions[place], keys, self.depth - 1, at)
                    logits[row, m] = self.says(seed)
        allowed = logits.astype(np.float64)
        allowed[..., MASK] = -np.inf
        probabilities = np.exp(allowed - allowed.max(-1, keepdims=True))
        probabilities /= probabilities.sum(-1, keepdims=True)
        return ForwardOutputs(probabilities.argmax(-1), probabilities.max(-1).astype(np.float32),
                              np.zeros((0, *inputs.input_ids.shape, 0), np.int32),
                              logits if inputs.want_logits else None, keys_values,
                              best_of(logits, MASK, inputs.candidates) if inputs.candidates else None)

    def says(self, seed):
        """Logits of a place, of the hash of what it sees."""
        return np.random.default_rng(seed).normal(0, 4, VOCAB)

    def _hash(self, query, keys, level, at):
        """`at`: where positions stand for the mask, if not where they are."""
        full = self.description.attention == "full"
        visible = sorted((p, key[level]) for p, key in keys.items()
                         if full or at.get(p, p) // N <= at.get(query, query) // N)
        return zlib.crc32(repr((query, visible if level >= 0 else None)).encode())


def decode(backend, prompts, **options):
    """Tokens of every prompt, and its last block."""
    tokens, last = [[] for _ in prompts], [None] * len(prompts)
    for block in BlockDiffusion(backend, DecodeSettings(**options)).decode(prompts):
        assert last[block.index] is None or last[block.index].finish_reason is None
        tokens[block.index] += block.token_ids
        last[block.index] = block
    return tokens, last
