"""What a forward means for a row: tokens chosen for masked places, accepted or not, and decoded ones replaced."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..description import Precision
from ..runtime.backend import Bools, ForwardOutputs, Ints
from ..runtime.candidates import MOST
from .acceptance import credit, edits, policy, scheduled
from .finite import check_finite
from .ranked import Ranked
from .row import Row
from .sampling import Reals, barring, draws_from, greedy, sample, sample_best, spared, without
from .settings import DecodeSettings


@dataclass(frozen=True)
class Chosen:
    """What a forward said about places of the window, and which of them it wrote."""

    asked: Ints  # places [m], as `Outcome.asked`
    tokens: Ints  # [m] the best of each, or a sample
    confidence: Reals  # [m]
    changed: Ints  # places that are others now
    source: Ints | None = None  # [m] of each asked place, which of them its token was at before; −1: a new place


class Decides(Protocol):
    """What the batch asks of a way to decode: which predictions it wants of a forward, and what they make of a row."""

    needs_logits: bool
    candidates: int  # wanted of each place

    def asked(self, row: Row) -> Ints:
        """Places of the window whose prediction is wanted."""
        ...

    def apply(self, row: Row, asked: Ints, outputs: ForwardOutputs, i: int) -> Chosen:
        """Take row i of the outputs, predictions for what `asked` says; raises NotFiniteError for no numbers."""
        ...


class Outcome:
    """Writes the outcome of decoding forwards into rows, as the settings want it.

    With `edit_threshold` it is joint editing (LLaDA2.1, arXiv 2602.08676; SGLang's `JointThreshold`): every step fills
    masked places and replaces decoded tokens. Probabilities are then of all tokens, the mask among them: where the mask
    is best, a place stays masked, or becomes it again; not from the last of `steps` on, which fills what is left.
    """

    def __init__(self, settings: DecodeSettings, mask_id: int, vocabulary: int, precision: Precision | None = None,
                 control: tuple[int, ...] = (), ends: tuple[int, ...] = ()) -> None:
        """`precision` of the model, where it is known: an error then says what may help.

        `control`: tokens that are never chosen; `ends`: those that are not where a template goes on.
        """
        self._settings, self._mask_id, self._precision = settings, mask_id, precision
        self._control, self._ends = control, ends
        barred = min(len({*control, *ends}), vocabulary - 1)
        self._accept = policy(settings)
        self._edits = settings.edit_threshold is not None
        ranks = draws_from(settings, vocabulary, barred)
        self._best = 1 + barred  # so many candidates hold one that may be chosen
        many = self._best > MOST  # to be found among candidates
        self._chooses = settings.temperature > 0 or settings.acceptance == "credit" or (many and not self._edits)
        # A penalty lowers a token that may be no candidate, draws without top_k and credits are over all tokens.
        self.needs_logits = bool(settings.penalty_lambda) or (self._chooses and not ranks) or many
        # The head says best token and share of all tokens but the mask; editing needs the mask's, too.
        self.candidates = 0 if self.needs_logits else ranks or (self._best if self._edits or barred else 0)

    def asked(self, row: Row) -> Ints:
        """Places of the window whose prediction is wanted: the masked ones, then those that may be edited."""
        return np.append(row.gaps(), row.editable())

    def apply(self, row: Row, asked: Ints, outputs: ForwardOutputs, i: int) -> Chosen:
        """Take row i of the outputs, predictions for what `asked` says.

        Raises NotFiniteError where these are NaN or infinite: one such logit makes the row's confidence NaN.
        """
        check_finite(row, outputs.confidence[i, :len(asked)], self._precision)
        gaps, logits = row.gaps(), self._logits(row, asked, outputs, i)
        best, certain = self._predicted(row, asked, logits, outputs, i)
        m = len(gaps)
        tokens, confidence = self._choose(row, gaps, best[:m], certain[:m], logits, outputs, i)
        accepted = self._accepted(row, gaps, confidence)
        places, values = gaps[accepted], tokens[accepted]
        said, certainty = tokens, confidence
        limit, decoded = self._settings.edit_threshold, asked[m:]
        if limit is not None and len(decoded):
            best, certain = best[m:], certain[m:]
            edited = edits(best, certain, row.canvas[row.window.start + decoded], limit)
            places, values = np.append(places, decoded[edited]), np.append(values, best[edited])
            row.statistics.edits += int(edited.sum())
            said, certainty = np.append(said, best), np.append(certainty, certain)
        written = row.canvas[row.window.start + places] != values
        row.write(places, values)
        return Chosen(asked[:len(said)], said, certainty, places[written])

    def _logits(self, row: Row, asked: Ints, outputs: ForwardOutputs, i: int) -> Reals | None:
        """Logits [m, V] of the asked places, where they are needed."""
        if not self.needs_logits or not len(asked):
            return None
        assert outputs.logits is not None
        logits = outputs.logits[i, :len(asked)]
        if self._settings.penalty_lambda:
            logits = logits.copy()
            behind = np.flatnonzero(asked % row.n)  # a block's first place has no token before it
            before = row.canvas[row.window.start + asked[behind] - 1]
            logits[behind, before] -= np.float32(self._settings.penalty_lambda)
        return logits

    def _predicted(self, row: Row, asked: Ints, logits: Reals | None, outputs: ForwardOutputs, i: int
                   ) -> tuple[Ints, Reals]:
        """Best tokens of the asked places and their probabilities [m]."""
        m = len(asked)
        tokens, confidence = outputs.token_ids[i, :m], outputs.confidence[i, :m]
        if not m:
            return tokens, confidence
        if self._edits:
            ranked = (Ranked.of_outputs(outputs, i, m, self._mask_id) if logits is None else
                      Ranked.of_logits(logits, self._mask_id, self._best))
            check_finite(row, ranked.log_sum, self._precision)
            return ranked.best(self._out(row, asked, ranked.token_ids), mask=not self._last(row))
        if (self._control or self._ends) and logits is None:
            found = outputs.candidates
            assert found is not None
            ids = found.token_ids[i, :m]
            ids, _, confidence = spared(ids, found.logits[i, :m], confidence, self._out(row, asked, ids))
            return ids[:, 0].astype(np.int64), confidence
        return tokens, confidence

    def _out(self, row: Row, places: Ints, token_ids: NDArray[Any]) -> Bools:
        """Which candidates [m, K] of places of the window are not chosen there."""
        return np.isin(token_ids, self._control) | (np.isin(token_ids, self._ends)
                                                    & self._goes_on(row, places)[:, None])

    @staticmethod
    def _goes_on(row: Row, places: Ints) -> Bools:
        """Behind which places of the window the template gives something."""
        return places + row.window.start < row.closed

    def _choose(self, row: Row, gaps: Ints, best: Ints, certain: Reals, logits: Reals | None,
                outputs: ForwardOutputs, i: int) -> tuple[Ints, Reals]:
        """Tokens [m] for the masked places and their confidences [m]."""
        m, settings = len(gaps), self._settings
        if not m or not self._chooses:
            return best, certain
        if logits is None:
            assert outputs.candidates is not None
            ids, values = outputs.candidates.token_ids[i, :m], outputs.candidates.logits[i, :m]
            check_finite(row, values[:, 0], self._precision)
            share = outputs.confidence[i, :m]
            if self._control or self._ends:
                ids, values, share = spared(ids, values, share, self._out(row, gaps, ids))
            return sample_best(ids, values, share, settings, row.rng)
        logits = without(logits[:m], self._mask_id)
        check_finite(row, logits.max(axis=-1), self._precision)  # some tokens may be at −inf, not all
        if settings.acceptance == "credit":
            logits, row.credits = credit(logits, gaps, row.credits, settings.credit_alpha, settings.credit_beta,
                                         settings.credit_gamma)
        allowed = barring(barring(logits, self._control), self._ends, self._goes_on(row, gaps))
        return sample(logits, settings, row.rng, allowed) if settings.temperature > 0 else greedy(logits, allowed)

    def _last(self, row: Row) -> bool:
        """Whether the block is out of steps."""
        return row.step + 1 >= self._settings.steps

    def _accepted(self, row: Row, gaps: Ints, confidence: Reals) -> Bools:
        """Which masked places [m] keep their choice."""
        if not len(gaps) or self._last(row):
            return np.ones(len(gaps), bool)  # out of steps: what is still masked takes its choice
        width = row.span.stop - row.span.start
        return self._accept(confidence, gaps, scheduled(width, self._settings.steps, row.step))

