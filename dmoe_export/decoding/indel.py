"""Editing that inserts and deletes (LLaDA2.2): places move inside the active block; with a template, behind it, too.

A step may write two control tokens. DELETE takes its place out. SPLIT puts a new mask before its place, whose old token
stays. What follows moves, and the block is cut, or filled with new masks, at its end. Neither token ever stands in the
block, so neither reaches the answer.

With a template, a gap takes as many of either as its range allows, and what is given stays: up to the last given place
all that follows moves, in later blocks, too.

Source: SGLang's `JointThresholdInDel`, recorded step by step in tests/golden/editing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..description import EditTokens, Precision
from ..runtime.backend import Bools, ForwardOutputs, Ints
from ..runtime.candidates import MOST
from .acceptance import policy, scheduled
from .finite import check_finite
from .outcome import Chosen
from .ranked import Ranked
from .row import Row
from .sampling import Reals, barring, draws_from, sample, sample_best, spared, without
from .settings import DecodeSettings

Bars = list[tuple[tuple[int, ...], Bools]]
"""Tokens, and the places [w] that do not take them."""


@dataclass
class Memory:
    """What is remembered of a block: `original` moves with the places, the rest is of places where they lie."""

    original: Bools  # [w] was a mask when the block began
    steps: int = 0
    post_steps: int = 0  # that began without an original mask; one that comes back takes none away
    seen: set[bytes] = field(default_factory=set)  # tokens of the block as steps found them
    written: dict[int, set[int]] = field(default_factory=dict)  # by place, what steps chose for it


@dataclass
class Step:
    """One step over the places behind the prompt [w]; chosen tokens are the mask, control tokens or others."""

    canvas: Ints
    masked: Bools
    tokens: Ints  # chosen
    confidence: Reals
    bars: Bars
    out: Bools  # [w, K] the candidates that `bars` rules out
    write: Bools = field(default_factory=lambda: np.zeros(0, bool))  # which places take their choice


class InsertDelete:
    """Decides what steps write where tokens may be put in and taken out; a `Decides` (outcome.py)."""

    def __init__(self, settings: DecodeSettings, mask_id: int, edit: EditTokens, vocabulary: int, block_length: int,
                 precision: Precision | None = None, ends: tuple[int, ...] = ()) -> None:
        """`precision` of the model, where it is known: an error then says what may help.

        `ends`: tokens that are not chosen where a template goes on.
        """
        self._settings, self._mask_id, self._precision = settings, mask_id, precision
        self._control, self._ends = (edit.delete, edit.split), ends
        self._accept = policy(settings)
        # All a step asks of a place is the best token that is neither a control token nor was chosen there before, and
        # that many candidates hold it; the mask's logit comes beside them. Draws without top_k are over all tokens.
        self._best = max(3, min(settings.steps, block_length) + settings.edit_passes + 2) + len(ends)
        drawn = draws_from(settings, vocabulary, len(self._control) + len(ends))
        enough = self._best <= MOST and (drawn > 0 or settings.temperature == 0)
        self._best = min(self._best, vocabulary)
        self.candidates = max(self._best, drawn) if enough else 0
        self.needs_logits = not enough

    def asked(self, row: Row) -> Ints:
        """All places of the active block but the prompt's."""
        span = row.span
        return np.arange(max(0, row.prompt_length - span.start), span.stop - span.start)

    def apply(self, row: Row, asked: Ints, outputs: ForwardOutputs, i: int) -> Chosen:
        """Take row i of the outputs, predictions for what `asked` says; raises NotFiniteError for no numbers."""
        check_finite(row, outputs.confidence[i, :len(asked)], self._precision)
        ranked = self._ranked(asked, outputs, i)
        check_finite(row, ranked.log_sum, self._precision)
        there = row.span.start + asked
        bars = self._bars(row, there)
        out = _out(bars, ranked.token_ids)
        step = Step(row.canvas[there], row.masked[there], *ranked.best(out, mask=True), bars, out)
        if row.memory is None:
            row.memory = Memory(step.masked.copy())
        memory: Memory = row.memory
        last = self._select(row, step, memory, ranked, outputs, i)
        self._permit(row, step, there, last)
        if not step.write.any():
            row.write(asked[:0], step.tokens[:0], settled=True)
            return Chosen(asked, step.tokens, step.confidence, asked[:0])
        if last:
            self._clean(step, ranked)
        else:
            self._leave_loop(step, memory, ranked, there < row.closed)
        for place in np.flatnonzero(step.write).tolist():
            memory.written.setdefault(place, set()).add(int(step.tokens[place]))
        self._count(row, step)
        row.write(asked, np.where(step.write & ~np.isin(step.tokens, self._control), step.tokens, step.canvas),
                  settled=last)
        self._move(row, step, memory, asked)
        moved = np.flatnonzero(row.canvas[there] != step.canvas)
        # Where tokens come out as they were and the block goes on, the forward must not become its commit.
        changed = moved if len(moved) or last else np.flatnonzero(step.write)
        return Chosen(asked, step.tokens, step.confidence, asked[changed])

    def _ranked(self, asked: Ints, outputs: ForwardOutputs, i: int) -> Ranked:
        if not self.needs_logits:
            return Ranked.of_outputs(outputs, i, len(asked), self._mask_id)
        assert outputs.logits is not None
        return Ranked.of_logits(outputs.logits[i, :len(asked)], self._mask_id, self._best)

    def _bars(self, row: Row, there: Ints) -> Bars:
        """Before what a template gives: no end token, and no control token for a mask whose gap has no room for it."""
        if row.template is None:
            return []
        closed = there < row.closed
        gap, masked = row.gap_of(there), closed & row.masked[there]
        return [(self._ends, closed), *(((token,), masked & (room[gap] == 0))
                                        for token, room in zip(self._control, row.room(), strict=True))]

    def _permit(self, row: Row, step: Step, there: Ints, last: bool) -> None:
        """Given places stay, and a gap takes the surest of the control tokens that it has room for."""
        step.write &= ~row.given[there]
        gap, held = row.gap_of(there), (there < row.closed) & ~(step.masked & last)  # the last step cleans masks
        for token, room in zip(self._control, row.room(), strict=True):
            said = np.flatnonzero(step.write & held & (step.tokens == token))
            for place in said[np.argsort(-step.confidence[said], kind="stable")].tolist():
                step.write[place] = not last and room[gap[place]] > 0
                room[gap[place]] -= 1

    def _select(self, row: Row, step: Step, memory: Memory, ranked: Ranked, outputs: ForwardOutputs, i: int) -> bool:
        """Choose tokens and what is written; whether this is the clean-up, the block's last step."""
        s, masked = self._settings, step.masked
        unresolved = memory.original & masked
        introduced = int(masked.sum() - unresolved.sum())
        memory.steps += 1
        memory.post_steps += not unresolved.any()
        most = min(s.steps, row.span.stop - row.span.start) + s.edit_passes
        last = memory.steps > most or (not unresolved.any() and memory.post_steps >= s.edit_passes)
        if s.temperature > 0:
            self._draw(row, step, last, outputs, i)
        if not last:  # an original mask may not be written back
            stays = unresolved & (step.tokens == self._mask_id)
            tokens, confidence = ranked.best(step.out)
            step.tokens, step.confidence = np.where(stays, tokens, step.tokens), np.where(stays, confidence,
                                                                                          step.confidence)
        fill = masked.copy()
        if unresolved.any() and not last:
            # New masks plus one: at least one of them is an original mask.
            wanted = introduced + max(1, scheduled(row.span.stop - row.span.start, s.steps, row.step))
            gaps = np.flatnonzero(masked)
            fill[gaps] = self._accept(step.confidence[gaps], gaps, wanted)
            if s.edit_passes == 0 and not (unresolved & ~fill).any():
                fill, last = masked.copy(), True
        assert s.edit_threshold is not None
        step.write = fill | (~masked & (step.tokens != step.canvas) & (step.confidence > s.edit_threshold))
        return last

    def _draw(self, row: Row, step: Step, last: bool, outputs: ForwardOutputs, i: int) -> None:
        """Samples in the place of the best tokens of masked places: never the mask, nor control tokens at the last."""
        gaps, s = np.flatnonzero(step.masked), self._settings
        bars = [*step.bars, (self._control, np.full(len(step.masked), last))]
        if not len(gaps):
            return
        if self.needs_logits:
            assert outputs.logits is not None
            logits = without(outputs.logits[i, gaps], self._mask_id)
            allowed = logits
            for tokens, places in bars:
                allowed = barring(allowed, tokens, places[gaps])
            drawn = sample(logits, s, row.rng, allowed)
        else:
            assert outputs.candidates is not None
            ids, values, best = (of[i, gaps] for of in (outputs.candidates.token_ids, outputs.candidates.logits,
                                                        outputs.confidence))
            out = _out([(tokens, places[gaps]) for tokens, places in bars], ids)
            drawn = sample_best(*spared(ids, values, best, out), s, row.rng)
        step.tokens[gaps], step.confidence[gaps] = drawn

    def _clean(self, step: Step, ranked: Ranked) -> None:
        """The last step writes neither the mask nor control tokens."""
        tokens, _ = ranked.best(step.out | np.isin(ranked.token_ids, self._control))
        step.tokens = np.where(np.isin(step.tokens, (self._mask_id, *self._control)), tokens, step.tokens)

    def _leave_loop(self, step: Step, memory: Memory, ranked: Ranked, closed: Bools) -> None:
        """Where steps have come back to the same tokens, the least sure change takes a token it has not had yet.

        No control token in `closed` places, those before what a template gives.
        """
        key = step.canvas.tobytes()
        if key in memory.seen:
            changing = np.flatnonzero(step.write & (step.tokens != step.canvas))
            if len(changing):
                place = int(changing[step.confidence[changing].argmin()])
                had = memory.written.get(place, set())
                original = bool(memory.original[place] and step.masked[place])
                one, barred = ranked.at(place), had | set(self._control if closed[place] else ())
                (token,), _ = one.best(step.out[place] | np.isin(one.token_ids, list(barred)),
                                       mask=not original and self._mask_id not in had)
                if token >= 0:  # else it has had all
                    step.tokens[place] = token
        memory.seen.add(key)

    def _count(self, row: Row, step: Step) -> None:
        deleted, inserted = (int((step.write & (step.tokens == token)).sum()) for token in self._control)
        row.statistics.deleted += deleted
        row.statistics.inserted += inserted
        row.statistics.edits += int((step.write & ~step.masked & ~np.isin(step.tokens, self._control)).sum())

    def _move(self, row: Row, step: Step, memory: Memory, asked: Ints) -> None:
        """Carry out the control tokens; what was said of places moves with them."""
        removed, split = (step.write & (step.tokens == token) for token in self._control)
        if not removed.any() and not split.any():
            return
        times = np.ones(row.span.stop - row.span.start, np.int64)
        times[asked] = np.where(removed, 0, 1 + split)
        source = row.move(times)[asked] - asked[0]
        here = (source >= 0) & (source < len(asked))
        # A mask that comes in from behind the block is one of the template's.
        behind = (source >= len(asked)) & row.masked[row.span][asked]
        memory.original = np.where(here, memory.original[source * here], behind)
        step.tokens = np.where(here, step.tokens[source * here], -1)  # nothing was said of new places
        step.confidence = np.where(here, step.confidence[source * here], 0)


def _out(bars: Bars, token_ids: NDArray[Any]) -> Bools:
    """Which candidates [w, K] of the places are barred there."""
    out = np.zeros(token_ids.shape, bool)
    for tokens, places in bars:
        out |= np.isin(token_ids, tokens) & places[:, None]
    return out
