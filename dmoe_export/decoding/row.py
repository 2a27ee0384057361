"""One sequence of a batch: its canvas, its active block, what is still masked."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from ..description import ModelDescription
from ..runtime.backend import Ints
from .acceptance import Credits
from .draft import Draft
from .settings import DecodeSettings
from .telemetry import Statistics
from .template import OPEN, Template

FinishReason = Literal["eos", "length", "filled", "stop", "timeout", "cancelled"]


class Row:
    """State of one sequence; positions are absolute.

    Block-causal models: blocks lie on the absolute grid, the first may begin with prompt. Full-canvas models: the
    canvas is prompt + new tokens and the blocks count from the prompt's end, as in LLaDA; the last may be shorter.
    Models with a canvas of random tokens: a canvas is a block, they begin behind the prompt and all have one length.
    """

    def __init__(self, index: int, prompt: list[int], settings: DecodeSettings, description: ModelDescription,
                 block_length: int, bytes_per_expert: int, template: Template | None = None,
                 complete: bool = False) -> None:
        """`template`: of the whole answer; blocks that it gives whole are never active.

        `complete`: an answer as long as may be is whole all the same, as its last place ends it.
        """
        self.index, self.settings, self.n = index, settings, block_length
        self.prompt_length = len(prompt)
        self.end = len(prompt) + settings.max_new_tokens
        self._full = description.attention == "full"
        whole = len(prompt) // block_length * block_length
        self._first = whole if description.attention == "block_causal" else len(prompt)
        self.prefill_length = len(prompt) if description.canvas else whole  # tokens of the prompt, cached by themselves
        self.read_length = self.prefill_length  # the same, with blocks that a template gives and those before them
        size = self.end if self._full else self._first - (self._first - self.end) // block_length * block_length
        self.canvas = np.full(size, description.barred_id, np.int64)
        self.canvas[:len(prompt)] = prompt
        # What is masked is remembered apart from the ids: a mask id in the prompt is text, not a gap.
        self.masked = np.arange(size) >= len(prompt)
        self.given = np.zeros(size, bool)  # places of the answer that the template gives
        self.template = template
        self._complete = complete
        self.closed = len(prompt)  # behind the last given place: nothing below this ends the answer
        self.spans = np.zeros((0, 2), np.int64)  # [gaps of the template, 2] where each starts and stops
        self.shifted = False  # the last step moved what is behind the active block
        if template:
            self.spans = len(prompt) + np.array([(gap.start, gap.stop) for gap in template.gaps])
            answer = slice(len(prompt), self.end)
            self.given[answer] = np.array(template.token_ids) != OPEN
            self.canvas[self.given] = [token for token in template.token_ids if token != OPEN]
            self.masked &= ~self.given
            self.closed += template.closed
        self.block = 0  # counted from the one in which the answer begins
        self.step = 0  # forwards that decoded the active block
        self.settled = False  # the active block is finished
        self.cached = 0  # tokens in the row's cache
        self.shift = int(description.logit_shift)
        self.credits: Credits = {}
        self.memory: Any = None  # what a way to decode remembers of the active block
        self._mask_id = description.barred_id
        self.draft: Draft | None = None  # of a canvas of random tokens
        self._edit_passes = 0
        self.emitted = len(prompt)  # positions below this were yielded
        self.eos_ids = description.eos_ids if settings.eos_ids is None else settings.eos_ids
        self.rng = np.random.default_rng(settings.seed + index)
        self.finish_reason: FinishReason | None = None
        self.statistics = Statistics(len(prompt), bytes_per_expert)
        self._pass_given()

    @property
    def span(self) -> slice:
        """Positions of the active block."""
        start = self._first + self.block * self.n
        return slice(start, min(start + self.n, len(self.canvas)))

    @property
    def window(self) -> slice:
        """Positions that steps may still change: the active block's and, with `edit_blocks`, those before it."""
        first = max(0, self.block - self.settings.edit_blocks)
        return slice(self._first + first * self.n, self.span.stop)

    @property
    def final(self) -> int:
        """No later block changes what is below this, once the active block is settled."""
        return self.span.stop - self.settings.edit_blocks * self.n

    @property
    def horizon(self) -> int:
        """The active block sees the positions below this."""
        return len(self.canvas) if self._full else self.span.stop

    def gaps(self) -> Ints:
        """Masked places of the window, as indices into it."""
        return np.flatnonzero(self.masked[self.window])

    def editable(self) -> Ints:
        """Decoded places of the window that editing may change; those of prompt and template are not."""
        if self.settings.edit_threshold is None:
            return np.zeros(0, np.int64)
        places = np.flatnonzero(~(self.masked | self.given)[self.window])
        return places[places + self.window.start >= self.prompt_length]

    def write(self, places: Ints, tokens: Ints, settled: bool | None = None) -> None:
        """The outcome of a step: tokens, or masks, for places of the window; see whether block or sequence have ended.
        `settled`: whether the block has, where the way to decode says so.
        """
        window = self.window
        had_gaps = bool(self.masked[window].any())
        self.shifted = False
        self.canvas[window.start + places] = tokens
        self.masked[window.start + places] = tokens == self._mask_id
        self.step += 1
        self._edit_passes += not had_gaps
        editing = self.settings.edit_threshold is not None and self._edit_passes < self.settings.edit_passes
        looked_over = not had_gaps and not len(places)
        ended = (looked_over or not editing) if settled is None else settled
        # Behind a template that is full, nothing of the block is wanted.
        full = self.template is not None and not self.masked[:self.end].any()
        self.settled = ended and (full or not self.masked[window].any())
        # While tokens can still be edited, an EOS is not final.
        if self.settled or (self.settings.early_stop and self.settings.edit_threshold is None):
            self._look_for_end(window.start)
        if self.settled and self.finish_reason is None and (full or window.stop >= self.end):
            self.finish_reason = "filled" if self.closed == self.end else "eos" if self._complete else "length"
        self.statistics.blocks += self.settled or self.finish_reason is not None

    def room(self) -> tuple[Ints, Ints]:
        """How many places each gap of the template may still lose, and gain."""
        gaps = self.template.gaps if self.template else ()
        count = self.spans[:, 1] - self.spans[:, 0]
        return (count - np.array([gap.fewest for gap in gaps], np.int64),
                np.array([gap.stop - gap.start for gap in gaps], np.int64) - count)

    def gap_of(self, places: Ints) -> Ints:
        """Which gap of the template each of these positions lies in; they are none that it gives."""
        return np.searchsorted(self.spans[:, 0], places, side="right") - 1

    def move(self, times: Ints) -> Ints:
        """Take out places of the active block where `times` [w] is 0, put a new mask before those where it is 2.

        Up to the last given place all that follows moves, the answer's end with it; behind, the block alone is cut, or
        filled with masks, at its end. Returns where each place of the block was, counted from the block's start; −1: it
        is a new mask.
        """
        span, wide = self.span, len(times)
        kept = min(max(self.closed - span.start, 0), wide)
        places = np.arange(len(self.canvas) - span.start)
        source = _fit(np.concatenate([
            _repeat(places[:kept], times[:kept]), _fit(_repeat(places[kept:wide], times[kept:]), wide - kept),
            places[wide:]]), len(places))
        new = source < 0
        self.canvas[span.start:] = np.where(new, self._mask_id, self.canvas[span.start:][source])
        self.masked[span.start:] = new | self.masked[span.start:][source]
        self.given[span.start:] = ~new & self.given[span.start:][source]
        by = np.append(0, np.cumsum(times[:kept] - 1))
        self.spans = self.spans + by[np.clip(self.spans - span.start, 0, kept)]
        self.end, self.closed = (int(at + by[min(max(at - span.start, 0), kept)]) for at in (self.end, self.closed))
        self.shifted = bool(by[-1])
        return source[:wide]

    def answer_gaps(self) -> tuple[tuple[int, int], ...] | None:
        """Where the gaps of the template lie in the tokens of the answer that were taken; None without one."""
        if self.template is None:
            return None
        first, last = (np.minimum(side - self.prompt_length, self.statistics.new_tokens) for side in self.spans.T)
        return tuple(zip(first.tolist(), last.tolist(), strict=True))

    def advance(self) -> None:
        """Go to the next block."""
        self.block += 1
        self.step = self._edit_passes = 0
        self.settled = False
        self.credits, self.memory = {}, None
        self._pass_given()

    def _pass_given(self) -> None:
        """Go on to the first block in which something is masked; there is one, or the row had ended."""
        first = self.block
        while not self.masked[self.span].any():
            self.block += 1
        if self.block > first:
            self.read_length = max(self.read_length, self.window.start)

    def _look_for_end(self, start: int) -> None:
        """An EOS of the answer with nothing masked before it ends the sequence."""
        first = max(start, self.closed)
        gaps = np.flatnonzero(self.masked[start:self.end])
        known = self.canvas[first:start + gaps[0]] if len(gaps) else self.canvas[first:self.end]
        hits = np.flatnonzero(np.isin(known, self.eos_ids))
        if len(hits):
            self.finish_reason = "eos"
            self.end = int(first + hits[0])

    def interrupt(self, reason: FinishReason) -> None:
        """End the sequence with the blocks before the active one, as far as all their places are decoded."""
        known = np.arange(self.emitted, self.span.start)
        ends = self.masked[known] | (np.isin(self.canvas[known], self.eos_ids) & (known >= self.closed))
        self.finish_reason, self.end = reason, self.emitted + (int(ends.argmax()) if ends.any() else len(known))

    def stop(self, surplus: int) -> None:
        """End the sequence in what was taken last, of which so many tokens are too many."""
        self.finish_reason = "stop"
        self.statistics.new_tokens -= surplus
        self.statistics.given_tokens -= int(self.given[self.emitted - surplus:self.emitted].sum())

    def take_new(self) -> list[int]:
        """Finished answer tokens that were not taken yet: whole blocks, or all when the sequence has ended."""
        stop = self.end if self.finish_reason else min(self.final, self.end)
        new = self.canvas[self.emitted:stop].tolist()
        self.emitted = max(self.emitted, stop)
        self.statistics.new_tokens += len(new)
        self.statistics.given_tokens += int(self.given[self.emitted - len(new):self.emitted].sum())
        return new


def _repeat(places: Ints, times: Ints) -> Ints:
    """Each of `places` so many times; the first of two is −1, a new mask."""
    repeated = np.repeat(places, times)
    repeated[:-1][repeated[1:] == repeated[:-1]] = -1
    return repeated


def _fit(places: Ints, count: int) -> Ints:
    """The first `count` of them; −1, new masks, where there are fewer."""
    return np.append(places[:count], np.full(max(0, count - len(places)), -1))
