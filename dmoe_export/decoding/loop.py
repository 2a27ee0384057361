"""Block diffusion with the exact block cache: prefill, denoise and commit rows of a batch, each at its own block.

Sources: LLaDA2.X and dMoE reference loops, with the corrections of spec decoding.md ("What the references get wrong").
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import RequestError
from ..runtime.backend import Backend, Cache, ForwardInputs, ForwardOutputs, Ints, Limits
from .acceptance import policy, schedule
from .row import FinishReason, Row
from .sampling import sample
from .settings import DecodeSettings
from .telemetry import Statistics

PREFILL_TOKENS = 512  # most tokens of a row in one prefill forward; chunks are exact under block-causal attention


@dataclass(frozen=True)
class BlockDecoded:
    """A finished block of one sequence; `finish_reason` is set on the last."""

    index: int
    token_ids: list[int]
    finish_reason: FinishReason | None
    statistics: Statistics


class BlockDiffusion:
    """Decodes a batch of prompts; iterate to get finished blocks as they come."""

    def __init__(self, backend: Backend, settings: DecodeSettings, bytes_per_expert: int = 0) -> None:
        self._backend, self._settings, self._bytes = backend, settings, bytes_per_expert
        self._n = backend.routing.block_length
        limit = (backend.limits or Limits()).max_tokens
        if limit is not None and limit < self._n:
            raise RequestError(f"The engine takes at most {limit} tokens in one forward, a block has {self._n}; build "
                               f"one with: dmoe-export build BUNDLE --max-prefill {self._n}.")
        self._chunk = max(1, min(PREFILL_TOKENS, limit or PREFILL_TOKENS) // self._n) * self._n
        self._accept = policy(settings)
        self._schedule = schedule(self._n, settings.steps)

    def decode(self, prompts: Sequence[Sequence[int]]) -> Iterator[BlockDecoded]:
        """Prompts of token ids (not empty) → finished blocks; a row's result does not depend on its neighbours.

        Raises RequestError when there are more prompts than the backend takes rows.
        """
        check_batch(self._backend, len(prompts))
        live = [Row(i, list(p), self._settings, self._backend.description, self._n, self._bytes)
                for i, p in enumerate(prompts)]
        cache = self._backend.new_cache(len(live))
        self._prefill(live, cache)
        while live:
            self._step(live, cache)
            for row in live:
                if row.finish_reason or (row.committing and row.emitted < min(row.span.stop, row.end)):
                    yield BlockDecoded(row.index, row.take_new(), row.finish_reason, row.statistics)
            staying = [i for i, row in enumerate(live) if row.finish_reason is None]
            if len(staying) < len(live):
                live = [live[i] for i in staying]
                if live:
                    cache.keep(staying)

    def _prefill(self, rows: list[Row], cache: Cache) -> None:
        """Whole prompt blocks, in chunks."""
        chunk = self._chunk
        longest = max(row.prefill_length for row in rows)
        for start in range(0, longest, chunk):
            width = min(chunk, longest - start)
            ids = np.zeros((len(rows), width), np.int64)
            positions = np.full((len(rows), width), -1, np.int64)
            for i, row in enumerate(rows):
                stop = min(row.prefill_length, start + width)
                if stop > start:
                    ids[i, :stop - start] = row.canvas[start:stop]
                    positions[i, :stop - start] = np.arange(start, stop)
            nothing = np.full((len(rows), 1), -1, np.int64)
            inputs = ForwardInputs(ids, positions, nothing, self._settings.routing, want_keys_values=True)
            outputs, seconds = self._forward(inputs, cache)
            cache.commit(inputs, outputs, positions >= 0)
            for i, row in enumerate(rows):
                if (positions[i] >= 0).any():
                    row.statistics.record("prefill", outputs.expert_ids[:, i], seconds)

    def _step(self, rows: list[Row], cache: Cache) -> None:
        """One forward of every row's active block: a denoise step, or the commit of a finished block."""
        committing = np.array([row.committing for row in rows])
        ids = np.stack([row.canvas[row.span] for row in rows])
        positions = np.stack([np.arange(row.span.start, row.span.stop) for row in rows])
        gaps = [row.gaps() for row in rows]
        inputs = ForwardInputs(ids, positions, _padded(gaps), self._settings.routing,
                               want_logits=self._settings.temperature > 0, want_keys_values=bool(committing.any()))
        outputs, seconds = self._forward(inputs, cache)
        for i, row in enumerate(rows):
            row.statistics.record("commit" if committing[i] else "denoise", outputs.expert_ids[:, i], seconds)
            if not committing[i]:
                self._denoise(row, gaps[i], outputs, i)
        if committing.any():
            cache.commit(inputs, outputs, np.broadcast_to(committing[:, None], ids.shape))
            for row, is_commit in zip(rows, committing, strict=True):
                if is_commit:
                    row.advance()

    def _denoise(self, row: Row, gaps: Ints, outputs: ForwardOutputs, i: int) -> None:
        """Choose tokens for the masked places and keep those the policy accepts."""
        m = len(gaps)
        if self._settings.temperature > 0:
            assert outputs.logits is not None
            mask_id = self._backend.description.mask_id
            tokens, confidence = sample(outputs.logits[i, :m], mask_id, self._settings, row.rng)
        else:
            tokens, confidence = outputs.token_ids[i, :m], outputs.confidence[i, :m]
        if row.step + 1 >= self._settings.steps:
            accepted = np.ones(m, bool)  # out of steps: what is still masked takes its choice
        else:
            accepted = self._accept(confidence, self._schedule[row.step])
        row.fill(gaps[accepted], tokens[accepted])

    def _forward(self, inputs: ForwardInputs, cache: Cache) -> tuple[ForwardOutputs, float]:
        start = time.perf_counter()
        outputs = self._backend.forward(inputs, cache)
        return outputs, time.perf_counter() - start


def check_batch(backend: Backend, rows: int) -> None:
    """Raise RequestError when a backend does not take so many rows at once."""
    most = (backend.limits or Limits()).max_batch
    if most is not None and rows > most:
        raise RequestError(f"{rows} prompts at once are more than the engine was built for ({most}); give fewer, or "
                           f"build one with: dmoe-export build BUNDLE --max-batch {rows}.")


def _padded(places: list[Ints]) -> Ints:
    """Ragged index lists as one array [B, M ≥ 1], −1 = nothing."""
    width = max(1, *(len(p) for p in places))
    out = np.full((len(places), width), -1, np.int64)
    for i, p in enumerate(places):
        out[i, :len(p)] = p
    return out
