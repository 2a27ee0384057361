"""One sequence of a batch: its canvas, its active block, what is still masked."""

from __future__ import annotations

from typing import Literal

import numpy as np

from ..description import ModelDescription
from ..runtime.backend import Ints
from .settings import DecodeSettings
from .telemetry import Statistics

FinishReason = Literal["eos", "length"]


class Row:
    """State of one sequence; positions are absolute, blocks lie on the absolute grid."""

    def __init__(self, index: int, prompt: list[int], settings: DecodeSettings, description: ModelDescription,
                 block_length: int, bytes_per_expert: int) -> None:
        self.index, self.settings, self.n = index, settings, block_length
        self.prompt_length = len(prompt)
        self.end = len(prompt) + settings.max_new_tokens
        size = -(-self.end // block_length) * block_length
        self.canvas = np.full(size, description.mask_id, np.int64)
        self.canvas[:len(prompt)] = prompt
        # What is masked is remembered apart from the ids: a mask id in the prompt is text, not a gap.
        self.masked = np.arange(size) >= len(prompt)
        self.block = len(prompt) // block_length
        self.step = 0
        self.emitted = len(prompt)  # positions below this were yielded
        self.eos_id = description.eos_id if settings.eos_id is None else settings.eos_id
        self.rng = np.random.default_rng(settings.seed + index)
        self.finish_reason: FinishReason | None = None
        self.statistics = Statistics(len(prompt), bytes_per_expert)

    @property
    def prefill_length(self) -> int:
        """Tokens in whole blocks of the prompt."""
        return self.prompt_length // self.n * self.n

    @property
    def span(self) -> slice:
        """Positions of the active block."""
        return slice(self.block * self.n, (self.block + 1) * self.n)

    @property
    def committing(self) -> bool:
        """The active block has no mask left: its next forward is its commit."""
        return not self.masked[self.span].any()

    def gaps(self) -> Ints:
        """Masked places of the active block, as indices into it."""
        return np.flatnonzero(self.masked[self.span])

    def fill(self, places: Ints, tokens: Ints) -> None:
        """Decode places of the active block, and see whether the sequence has ended."""
        start = self.block * self.n
        self.canvas[start + places] = tokens
        self.masked[start + places] = False
        self.step += 1
        done = not self.masked[self.span].any()
        if done or self.settings.early_stop:
            self._look_for_end(start)
        if done and self.finish_reason is None and self.span.stop >= self.end:
            self.finish_reason = "length"

    def advance(self) -> None:
        """Go to the next block."""
        self.block += 1
        self.step = 0

    def _look_for_end(self, start: int) -> None:
        """An EOS of the answer with nothing masked before it ends the sequence."""
        first = max(start, self.prompt_length)
        gaps = np.flatnonzero(self.masked[first:self.end])
        known = self.canvas[first:first + gaps[0]] if len(gaps) else self.canvas[first:self.end]
        hits = np.flatnonzero(known == self.eos_id)
        if len(hits):
            self.finish_reason = "eos"
            self.end = int(first + hits[0])

    def take_new(self) -> list[int]:
        """Finished answer tokens that were not taken yet: whole blocks, or all when the sequence has ended."""
        stop = self.end if self.finish_reason else min(self.span.stop, self.end)
        new = self.canvas[self.emitted:stop].tolist()
        self.emitted = max(self.emitted, stop)
        self.statistics.new_tokens += len(new)
        self.statistics.blocks += 1
        return new
