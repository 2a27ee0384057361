"""How a canvas of random tokens is decoded: draw, accept by entropy, new random tokens elsewhere, until it is stable.

Nothing stays accepted: every step decides the whole canvas again, and the model is told what the step before thought of
each place (`soft_embeddings`). The result is the most probable token of each place in the last step, never the canvas
of drawn and random ones. Source: DiffusionGemma, `generation_diffusion_gemma.py` of transformers 5.24.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..description import ModelDescription, Precision
from ..runtime.backend import Bools, Floats, ForwardOutputs, Ints
from .canvas_options import CanvasOptions
from .draft import Draft
from .entropy_bound import entropy_bound
from .finite import check_finite
from .noise import KeyedNoise, Noise
from .outcome import Chosen
from .row import Row
from .sampling import spared
from .settings import DecodeSettings


class Renoise:
    """`Decides` for models with a canvas; a row's canvas stays masked until it is finished."""

    needs_logits = False

    def __init__(self, settings: DecodeSettings, description: ModelDescription, precision: Precision | None = None,
                 ends: tuple[int, ...] = (), noise: Callable[[Row], Noise] | None = None) -> None:
        """`ends`: tokens that are not chosen where a template goes on.

        `noise`: of a row; by default keyed by the request's seed + the row's index, as elsewhere.
        """
        assert description.canvas is not None
        self._ends, self.candidates = ends, 1 + len(ends) if ends else 0  # so many hold one that may be chosen
        self._steps, self._precision, self._options = settings.steps, precision, CanvasOptions.of(settings)
        length, vocabulary = description.canvas.length, description.vocab_size
        self._noise = noise or (lambda row: KeyedNoise(settings.seed + row.index, length, vocabulary))

    def asked(self, row: Row) -> Ints:
        """All places of the canvas; who asks first draws its random tokens."""
        if row.draft is None or row.draft.canvas != row.block:
            row.draft = Draft(row.block, self._noise(row) if row.draft is None else row.draft.noise)
            row.canvas[row.span] = np.where(row.given[row.span], row.canvas[row.span],
                                            row.draft.noise.first(row.block))
        return np.arange(row.n)

    def temperature(self, row: Row) -> float:
        """Of the row's next step: from exactly `t_max` in the first on, linearly, the last still above `t_min`."""
        o = self._options
        return o.t_min + (o.t_max - o.t_min) * (self._steps - row.step) / self._steps

    def apply(self, row: Row, asked: Ints, outputs: ForwardOutputs, i: int) -> Chosen:
        """See `Decides`; `changed` are places whose drawn tokens were accepted, in the last step all.

        Places that a template gives keep its tokens, and have no say in whether the canvas is finished.
        """
        said, draft, m = outputs.canvas, row.draft, len(asked)
        assert said is not None and draft is not None
        check_finite(row, said.entropy[i, :m], self._precision)
        given, now = row.given[row.span], row.canvas[row.span]
        entropy, (best, confidence) = said.entropy[i, :m], self._best(row, outputs, i, m)
        best = np.where(given, now, best)
        same = draft.best is not None and np.array_equal(draft.best, best)
        draft.best, draft.repeats = best.copy(), draft.repeats + 1 if same else 0
        stable = draft.repeats >= self._options.stability_threshold
        sure = entropy[~given].mean(dtype=np.float64) < self._options.confidence_threshold
        if row.step + 1 >= self._steps or (stable and sure):
            row.write(asked[~given], best[~given])
            return Chosen(asked, best, confidence, asked[~given])
        accepted = np.zeros(m, bool)
        accepted[~given] = entropy_bound(entropy[~given], self._options.entropy_bound)
        accepted &= ~(np.isin(said.sampled_ids[i, :m], self._ends) & self._goes_on(row))
        drawn = np.where(accepted, said.sampled_ids[i, :m], draft.noise.again(row.block, row.step))
        row.canvas[row.span] = np.where(given, now, drawn)
        draft.soft_embeddings = said.soft_embeddings[i, :m].copy()
        row.step += 1
        row.statistics.accepted_by_step.append(int(accepted.sum()))
        return Chosen(asked, best, confidence, asked[accepted])

    def _best(self, row: Row, outputs: ForwardOutputs, i: int, m: int) -> tuple[Ints, Floats]:
        """Most probable tokens [m] that may be chosen, and their probabilities [m]."""
        best, confidence = outputs.token_ids[i, :m], outputs.confidence[i, :m]
        if not self._ends:
            return best, confidence
        assert outputs.candidates is not None
        ids, logits = outputs.candidates.token_ids[i, :m], outputs.candidates.logits[i, :m]
        ids, _, share = spared(ids, logits, confidence, np.isin(ids, self._ends))
        goes_on = self._goes_on(row)
        return np.where(goes_on, ids[:, 0], best), np.where(goes_on, share, confidence)

    @staticmethod
    def _goes_on(row: Row) -> Bools:
        """Behind which places of the canvas the template gives something."""
        return np.arange(row.span.start, row.span.stop) < row.closed
