"""Decoding an answer that must match: places take tokens that leave the canvas a filling that matches.

A step chooses for every masked place the best token, or draws one, of those that the grammar allows there, all else as
it is; confidences are the model's own. The acceptance policy says which places keep their choice, and these are taken
by falling confidence, each if the canvas with all before it still allows it; the others stay masked. The first is
always taken, so every step makes progress. In the last of `steps` all places are taken, and one whose choice is no
longer allowed chooses again.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from ..description import Precision
from ..grammar.canvas import MASKED, Canvas, Rule
from ..grammar.grammar import Grammar
from ..runtime.backend import Bools, ForwardOutputs, Ints
from .acceptance import credit, policy, scheduled
from .finite import check_finite
from .outcome import Chosen
from .row import Row
from .sampling import Reals, greedy, sample, without
from .settings import DecodeSettings

_TRIED = 16  # best tokens of a place that are looked at before all are


@dataclass
class _Choices:
    """What a step makes of m masked places."""

    canvas: Canvas
    at: list[int]  # where in the canvas they are
    logits: Reals  # [m, V] of the forward, or float64 with credit
    tokens: Ints  # [m]
    confidence: Reals  # [m]
    forced: Bools  # [m] the model's best token was not allowed


class Constrained:
    """A `Decides` (outcome.py) for answers that must match."""

    needs_logits = True  # the best token that is allowed may be any

    def __init__(self, settings: DecodeSettings, mask_id: int, vocabulary: int, grammar: Grammar, rule: Rule,
                 precision: Precision | None = None) -> None:
        """`rule`: of the whole answer, with the grammar's steps. `precision` of the model: an error then says what may
        help.
        """
        self._settings, self._mask_id, self._precision = settings, mask_id, precision
        self._grammar, self._rule, self._accept = grammar, rule, policy(settings)
        self._ranked = settings.temperature == 0 and settings.acceptance != "credit"
        self.candidates = min(_TRIED, vocabulary) if self._ranked else 0

    def asked(self, row: Row) -> Ints:
        """The masked places of the block."""
        return row.gaps()

    def apply(self, row: Row, asked: Ints, outputs: ForwardOutputs, i: int) -> Chosen:
        """Take row i of the outputs, predictions for what `asked` says; raises NotFiniteError for no numbers."""
        m = len(asked)
        check_finite(row, outputs.confidence[i, :m], self._precision)
        logits = self._logits(row, asked, outputs, i)
        start = time.perf_counter()
        with self._grammar.lock:
            if row.memory is None:
                row.memory = self._canvas(row)
            behind = row.window.start - row.prompt_length - row.memory.first
            one = _Choices(row.memory, (asked + behind).tolist(), logits, np.zeros(m, np.int64),
                           np.zeros(m, np.float32), np.zeros(m, bool))
            if self._ranked:
                self._rank(one, outputs, i)
            else:
                self._choose(row, one, np.arange(m))
            taken = self._take(row, one, asked)
        row.statistics.count_constrained(int(one.forced[taken].sum()), time.perf_counter() - start)
        row.write(asked[taken], one.tokens[taken])
        return Chosen(asked, one.tokens, one.confidence, asked[taken])

    def _canvas(self, row: Row) -> Canvas:
        """The places of the active block behind the prompt."""
        first, stop = max(row.span.start, row.prompt_length), row.span.stop
        tokens = np.where(row.masked[first:stop], MASKED, row.canvas[first:stop])
        return Canvas(self._rule, row.canvas[row.prompt_length:first].tolist(), tokens.tolist())

    def _logits(self, row: Row, asked: Ints, outputs: ForwardOutputs, i: int) -> Reals:
        assert outputs.logits is not None
        logits: Reals = outputs.logits[i, :len(asked)]
        if self._ranked:
            return logits
        logits = without(logits, self._mask_id)
        check_finite(row, logits.max(axis=-1), self._precision)  # some tokens may be at −inf, not all
        if self._settings.acceptance == "credit":
            s = self._settings
            logits, row.credits = credit(logits, asked, row.credits, s.credit_alpha, s.credit_beta, s.credit_gamma)
        return logits

    def _rank(self, one: _Choices, outputs: ForwardOutputs, i: int) -> None:
        """The best allowed tokens: most are among the candidates."""
        found = outputs.candidates
        assert found is not None
        for j, place in enumerate(one.at):
            ids = found.token_ids[i, j].tolist()
            rank = next((k for k, token in enumerate(ids) if one.canvas.allows(place, token)), None)
            token = ids[rank] if rank is not None else self._best(one, j)
            # The candidates' first has the confidence; others have its share, as `spared` has it.
            share = np.exp(np.float64(one.logits[j, token]) - found.logits[i, j, 0])
            one.tokens[j], one.confidence[j] = token, outputs.confidence[i, j] * share
            one.forced[j] = rank != 0

    @staticmethod
    def _best(one: _Choices, j: int) -> int:
        return int(_only(one.logits[j], one.canvas.allowed(one.at[j])).argmax())

    def _choose(self, row: Row, one: _Choices, places: Ints) -> None:
        """The best allowed tokens of some of the m places, or drawn ones, of all logits."""
        logits = one.logits[places]
        allowed = np.empty_like(logits)
        for k, j in enumerate(places.tolist()):
            may = one.canvas.allowed(one.at[j])
            allowed[k] = _only(logits[k], may)
            one.forced[j] |= not may[logits[k].argmax()]
        draws = self._settings.temperature > 0
        one.tokens[places], one.confidence[places] = (sample(logits, self._settings, row.rng, allowed) if draws else
                                                      greedy(logits, allowed))

    def _take(self, row: Row, one: _Choices, asked: Ints) -> Ints:
        """Which of the m places take their choice, rising."""
        last = row.step + 1 >= self._settings.steps
        width = row.span.stop - row.span.start
        accepted = np.ones(len(asked), bool) if last else self._accept(
            one.confidence, asked, scheduled(width, self._settings.steps, row.step))
        taken = []
        for j in np.argsort(-one.confidence, kind="stable").tolist():
            if not accepted[j]:
                continue
            if not one.canvas.allows(one.at[j], int(one.tokens[j])):
                if not last:
                    continue
                self._again(row, one, j)
            one.canvas.take(one.at[j], int(one.tokens[j]))
            taken.append(j)
        return np.array(sorted(taken), np.int64)

    def _again(self, row: Row, one: _Choices, j: int) -> None:
        """Choose for a place whose choice other places have made impossible."""
        one.forced[j] = True
        if not self._ranked:
            self._choose(row, one, np.array([j]))
            return
        token = self._best(one, j)
        one.confidence[j] *= np.exp(np.float64(one.logits[j, token]) - one.logits[j, one.tokens[j]])
        one.tokens[j] = token


def _only(logits: Reals, allowed: Bools) -> Reals:
    """Logits [V] of the allowed tokens, the others at −inf; where the model gives all allowed ones no chance, alike."""
    kept = np.where(allowed, logits, -np.inf)
    return kept if kept.max() > -np.inf else np.where(allowed, 0.0, -np.inf)
