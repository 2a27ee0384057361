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
from ..runtime.candidates import MOST, best_of
from .acceptance import credit, policy, scheduled
from .finite import check_finite
from .outcome import Chosen
from .row import Row
from .sampling import Reals, greedy, sample, sample_best, without
from .settings import DecodeSettings

_TRIED = 16  # best tokens of a place that are looked at before all are


@dataclass
class _Choices:
    """What a step makes of m masked places."""

    canvas: Canvas
    at: list[int]  # where in the canvas they are
    logits: Reals  # [m, V] of the forward, or in float64 without the mask and with credit
    best: Ints  # [m] the model's own choice, allowed or not
    sure: Reals  # [m] its probability
    tokens: Ints  # [m]
    confidence: Reals  # [m]
    forced: Bools  # [m] the best token was not allowed

    def share(self, j: int, token: int) -> float:
        """The model's probability of a token, of its best one's as `spared` has it."""
        behind = np.float64(self.logits[j, token]) - self.logits[j, self.best[j]]
        return float(self.sure[j] * np.exp(behind))

    def allowed(self, j: int) -> Reals:
        """Logits [V], the tokens that are not allowed at −inf; where all others are, too, these are alike."""
        may = self.canvas.allowed(self.at[j])
        kept = np.where(may, self.logits[j], np.float32(-np.inf))
        return kept if kept.max() > -np.inf else np.where(may, np.float32(0), np.float32(-np.inf))


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
        credits = settings.acceptance == "credit"
        self._ranked = settings.temperature == 0 and not credits
        self._few = settings.temperature > 0 and 0 < settings.top_k <= MOST and not credits
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
            one = _Choices(row.memory, (asked + behind).tolist(), logits, outputs.token_ids[i, :m],
                           outputs.confidence[i, :m], np.zeros(m, np.int64), np.zeros(m, np.float32), np.zeros(m, bool))
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
        if self._ranked or self._few:
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
            token = next((token for token in ids if one.canvas.allows(place, token)), None)
            one.tokens[j] = one.allowed(j).argmax() if token is None else token
            one.confidence[j] = one.share(j, int(one.tokens[j]))
            one.forced[j] = token != ids[0]

    def _choose(self, row: Row, one: _Choices, places: Ints) -> None:
        """The best allowed tokens of some of the m places, or drawn ones, of all logits."""
        s, allowed = self._settings, np.stack([one.allowed(j) for j in places.tolist()])
        if self._few:
            found = best_of(allowed[None], -1, min(s.top_k, allowed.shape[1]))
            ids, values = found.token_ids[0], found.logits[0]
            first = np.array([one.share(j, int(token)) for j, token in zip(places, ids[:, 0], strict=True)])
            chosen = sample_best(ids, values, first, s, row.rng)
            best = one.best[places]
        else:
            logits = one.logits[places]
            chosen = sample(logits, s, row.rng, allowed) if s.temperature > 0 else greedy(logits, allowed)
            best = logits.argmax(axis=-1)
        one.tokens[places], one.confidence[places] = chosen
        one.forced[places] |= allowed[np.arange(len(places)), best] == -np.inf

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
        one.tokens[j] = one.allowed(j).argmax()
        one.confidence[j] = one.share(j, int(one.tokens[j]))
