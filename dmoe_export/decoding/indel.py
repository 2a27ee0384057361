"""Editing that inserts and deletes (LLaDA2.2): places move inside the active block, and nowhere else.

A step may write two control tokens. DELETE takes its place out. SPLIT puts a new mask before its place, whose old token
stays. What follows moves, and the block is cut, or filled with new masks, at its end. Neither token ever stands in the
block, so neither reaches the answer.

Source: SGLang's `JointThresholdInDel`, recorded step by step in tests/golden/editing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

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
    write: Bools = field(default_factory=lambda: np.zeros(0, bool))  # which places take their choice
    source: Ints | None = None  # where places were before they moved; −1: new ones


class InsertDelete:
    """Decides what steps write where tokens may be put in and taken out; a `Decides` (outcome.py)."""

    def __init__(self, settings: DecodeSettings, mask_id: int, edit: EditTokens, vocabulary: int, block_length: int,
                 precision: Precision | None = None) -> None:
        """`precision` of the model, where it is known: an error then says what may help."""
        self._settings, self._mask_id, self._edit, self._precision = settings, mask_id, edit, precision
        self._control = (edit.delete, edit.split)
        self._accept = policy(settings)
        # All a step asks of a place is the best token that is neither a control token nor was chosen there before, and
        # that many candidates hold it; the mask's logit comes beside them. Draws without top_k are over all tokens.
        self._best = max(3, min(settings.steps, block_length) + settings.edit_passes + 2)
        drawn = draws_from(settings, vocabulary, len(self._control))
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
        step = Step(row.canvas[there], row.masked[there], *ranked.best(mask=True))
        if row.memory is None:
            row.memory = Memory(step.masked.copy())
        memory: Memory = row.memory
        last = self._select(row, step, memory, ranked, outputs, i)
        if not step.write.any():
            row.write(asked[:0], step.tokens[:0], settled=True)
            return Chosen(asked, step.tokens, step.confidence, asked[:0])
        if last:
            self._clean(step, ranked)
        else:
            self._leave_loop(step, memory, ranked)
        for place in np.flatnonzero(step.write).tolist():
            memory.written.setdefault(place, set()).add(int(step.tokens[place]))
        self._count(row, step)
        chosen = self._move(step, memory, asked)
        moved = np.flatnonzero(chosen != step.canvas)
        row.write(asked, chosen, settled=last)
        # Where tokens come out as they were and the block goes on, the forward must not become its commit.
        changed = moved if len(moved) or last else np.flatnonzero(step.write)
        return Chosen(asked, step.tokens, step.confidence, asked[changed], step.source)

    def _ranked(self, asked: Ints, outputs: ForwardOutputs, i: int) -> Ranked:
        if not self.needs_logits:
            return Ranked.of_outputs(outputs, i, len(asked), self._mask_id)
        assert outputs.logits is not None
        return Ranked.of_logits(outputs.logits[i, :len(asked)], self._mask_id, self._best)

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
            tokens, confidence = ranked.best()
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
        barred = self._control if last else ()
        if not len(gaps):
            return
        if self.needs_logits:
            assert outputs.logits is not None
            logits = without(outputs.logits[i, gaps], self._mask_id)
            drawn = sample(logits, s, row.rng, barring(logits, barred))
        else:
            assert outputs.candidates is not None
            ids, values, best = (of[i, gaps] for of in (outputs.candidates.token_ids, outputs.candidates.logits,
                                                        outputs.confidence))
            drawn = sample_best(*spared(ids, values, best, np.isin(ids, barred)), s, row.rng)
        step.tokens[gaps], step.confidence[gaps] = drawn

    def _clean(self, step: Step, ranked: Ranked) -> None:
        """The last step writes neither the mask nor control tokens."""
        tokens, _ = ranked.best(self._control)
        step.tokens = np.where(np.isin(step.tokens, (self._mask_id, *self._control)), tokens, step.tokens)

    def _leave_loop(self, step: Step, memory: Memory, ranked: Ranked) -> None:
        """Where steps have come back to the same tokens, the least sure change takes a token it has not had yet."""
        key = step.canvas.tobytes()
        if key in memory.seen:
            changing = np.flatnonzero(step.write & (step.tokens != step.canvas))
            if len(changing):
                place = int(changing[step.confidence[changing].argmin()])
                had = memory.written.get(place, set())
                original = bool(memory.original[place] and step.masked[place])
                (token,), _ = ranked.at(place).best(had, mask=not original and self._mask_id not in had)
                if token >= 0:  # else it has had all
                    step.tokens[place] = token
        memory.seen.add(key)

    def _count(self, row: Row, step: Step) -> None:
        deleted, inserted = (int((step.write & (step.tokens == token)).sum()) for token in self._control)
        row.statistics.deleted += deleted
        row.statistics.inserted += inserted
        row.statistics.edits += int((step.write & ~step.masked & ~np.isin(step.tokens, self._control)).sum())

    def _move(self, step: Step, memory: Memory, asked: Ints) -> Ints:
        """The tokens [w] after the step, control tokens carried out; what was said of places moves with them."""
        wide = len(step.canvas)
        chosen = np.where(step.write, step.tokens, step.canvas)
        removed, split = (step.write & (step.tokens == token) for token in self._control)
        if not removed.any() and not split.any():
            return chosen
        chosen = np.where(split, step.canvas, chosen)
        times = np.where(removed, 0, 1 + split)
        source = np.repeat(np.arange(wide), times)  # of each place after the step
        new = np.append(source[1:] == source[:-1], False) if len(source) else np.zeros(0, bool)
        source, new = source[:wide], new[:wide]
        padding = wide - len(source)

        def moved(values: np.ndarray, nothing: float) -> np.ndarray:
            kept = np.where(new, nothing, values[source])
            return np.append(kept, np.full(padding, nothing)).astype(values.dtype)

        step.source = moved(np.arange(wide), -1)
        memory.original = moved(memory.original, False)
        step.tokens = moved(step.tokens, -1)  # nothing was said of new places
        step.confidence = moved(step.confidence, 0)
        return moved(chosen, self._mask_id)
