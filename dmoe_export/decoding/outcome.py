"""What a forward means for a row: tokens chosen for masked places, accepted or not, and decoded ones edited."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..description import Precision
from ..runtime.backend import Bools, ForwardOutputs, Ints
from .acceptance import credit, edits, policy, scheduled
from .finite import check_finite
from .row import Row
from .sampling import Reals, draws_from, greedy, sample, sample_best, without
from .settings import DecodeSettings


@dataclass(frozen=True)
class Chosen:
    """What a forward said about places of the active block, and which of them it wrote."""

    asked: Ints  # places [m], as `Outcome.asked`
    tokens: Ints  # [m] the best of each, or a sample
    confidence: Reals  # [m]
    changed: Ints  # places that were written


class Decides(Protocol):
    """What the batch asks of a way to decode: which predictions it wants of a forward, and what they make of a row."""

    needs_logits: bool
    candidates: int  # wanted of each place

    def asked(self, row: Row) -> Ints:
        """Places of the active block whose prediction is wanted."""
        ...

    def apply(self, row: Row, asked: Ints, outputs: ForwardOutputs, i: int) -> Chosen:
        """Take row i of the outputs, predictions for what `asked` says; raises NotFiniteError for no numbers."""
        ...


class Outcome:
    """Writes the outcome of decoding forwards into rows, as the settings want it."""

    def __init__(self, settings: DecodeSettings, mask_id: int, vocabulary: int,
                 precision: Precision | None = None) -> None:
        """`precision` of the model, where it is known: an error then says what may help."""
        self._settings, self._mask_id, self._precision = settings, mask_id, precision
        self._accept = policy(settings)
        self.candidates = draws_from(settings, vocabulary)  # wanted of each place
        self.needs_logits = not self.candidates and (settings.temperature > 0 or settings.acceptance == "credit")

    def asked(self, row: Row) -> Ints:
        """Places of the active block whose prediction is wanted: the masked ones, then those that may be edited."""
        return np.append(row.gaps(), row.editable())

    def apply(self, row: Row, asked: Ints, outputs: ForwardOutputs, i: int) -> Chosen:
        """Take row i of the outputs, predictions for what `asked` says.

        Raises NotFiniteError where these are NaN or infinite: one such logit makes the row's confidence NaN.
        """
        self._check_finite(row, outputs.confidence[i, :len(asked)])
        gaps = row.gaps()
        tokens, confidence = self._choose(row, gaps, outputs, i)
        accepted = self._accepted(row, gaps, confidence)
        places, values = gaps[accepted], tokens[accepted]
        said, certainty = tokens, confidence
        limit, decoded = self._settings.edit_threshold, asked[len(gaps):]
        if limit is not None and len(decoded):
            there = slice(len(gaps), len(asked))
            best, certain = outputs.token_ids[i, there], outputs.confidence[i, there]
            edited = edits(best, certain, row.canvas[row.span.start + decoded], limit)
            places, values = np.append(places, decoded[edited]), np.append(values, best[edited])
            row.statistics.edits += int(edited.sum())
            said, certainty = np.append(said, best), np.append(certainty, certain)
        row.write(places, values)
        return Chosen(asked[:len(said)], said, certainty, places)

    def _choose(self, row: Row, gaps: Ints, outputs: ForwardOutputs, i: int) -> tuple[Ints, Reals]:
        """Tokens [m] for the masked places and their confidences [m]."""
        m, settings = len(gaps), self._settings
        if self.candidates and m:
            assert outputs.candidates is not None
            ids, best = outputs.candidates.token_ids[i, :m], outputs.candidates.logits[i, :m]
            self._check_finite(row, best[:, 0])
            return sample_best(ids, best, outputs.confidence[i, :m], settings, row.rng)
        if not self.needs_logits or not m:
            return outputs.token_ids[i, :m], outputs.confidence[i, :m]
        assert outputs.logits is not None
        logits = without(outputs.logits[i, :m], self._mask_id)
        self._check_finite(row, logits.max(axis=-1))  # some tokens may be at −inf, not all
        if settings.acceptance == "credit":
            logits, row.credits = credit(logits, gaps, row.credits, settings.credit_alpha, settings.credit_beta,
                                         settings.credit_gamma)
        return sample(logits, settings, row.rng) if settings.temperature > 0 else greedy(logits)

    def _accepted(self, row: Row, gaps: Ints, confidence: Reals) -> Bools:
        """Which masked places [m] keep their choice."""
        if not len(gaps) or row.step + 1 >= self._settings.steps:
            return np.ones(len(gaps), bool)  # out of steps: what is still masked takes its choice
        width = row.span.stop - row.span.start
        return self._accept(confidence, gaps, scheduled(width, self._settings.steps, row.step))

    def _check_finite(self, row: Row, numbers: Reals) -> None:
        check_finite(row, numbers, self._precision)
