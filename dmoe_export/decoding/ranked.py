"""The best tokens of places, the mask among them: what editing decides by, whose probabilities are of all tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ..runtime.backend import Bools, ForwardOutputs, Ints
from ..runtime.candidates import best_of
from .sampling import Reals


@dataclass(frozen=True)
class Ranked:
    """The K best tokens of m places but the mask, the mask's own logits, and what makes probabilities of logits."""

    token_ids: Ints  # [m, K] best first; −1: there are no more
    logits: Reals  # [m, K] float64; −inf there
    mask_logits: Reals  # [m]
    log_sum: Reals  # [m] ln Σ exp(logit) over all tokens, the mask among them
    mask_id: int

    @classmethod
    def of_outputs(cls, outputs: ForwardOutputs, i: int, m: int, mask_id: int) -> Ranked:
        """Of the first m places of row i of a forward that gave candidates: as exact as the confidence is."""
        found = outputs.candidates
        assert found is not None
        logits = found.logits[i, :m].astype(np.float64)
        # The confidence is the best token's share of all but the mask.
        others = logits[:, 0] - np.log(outputs.confidence[i, :m].astype(np.float64))
        masks = found.mask_logits[i, :m].astype(np.float64)
        return cls(found.token_ids[i, :m].astype(np.int64), logits, masks, np.logaddexp(others, masks), mask_id)

    @classmethod
    def of_logits(cls, logits: Reals, mask_id: int, count: int) -> Ranked:
        """Of logits [m, V] float32 themselves; `count` is K."""
        found = best_of(logits[None], mask_id, count)
        most = logits.max(axis=-1, keepdims=True)
        log_sum = np.log(np.exp(logits - most).sum(axis=-1, dtype=np.float64)) + most[:, 0]
        return cls(found.token_ids[0].astype(np.int64), found.logits[0].astype(np.float64),
                   found.mask_logits[0].astype(np.float64), log_sum, mask_id)

    def best(self, barred: Iterable[int] | Bools = (), mask: bool = False) -> tuple[Ints, Reals]:
        """Best tokens [m] outside `barred` and their probabilities [m]; `mask`: it may be the best, too.

        `barred`: tokens, or which candidates [m, K]. Of equal logits the lower token is better. −1 and 0 where nothing
        is left.
        """
        out = barred if isinstance(barred, np.ndarray) else np.isin(self.token_ids, list(barred))
        places = np.arange(len(self.token_ids))
        first = (~out).argmax(axis=1)
        tokens, logits = self.token_ids[places, first], self.logits[places, first]
        gone = out[places, first]
        tokens, logits = np.where(gone, -1, tokens), np.where(gone, -np.inf, logits)
        if mask:
            wins: Bools = (self.mask_logits > logits) | ((self.mask_logits == logits) & (self.mask_id < tokens))
            tokens, logits = np.where(wins, self.mask_id, tokens), np.where(wins, self.mask_logits, logits)
        return tokens, np.exp(logits - self.log_sum)

    def at(self, place: int) -> Ranked:
        """One place alone."""
        one = slice(place, place + 1)
        return Ranked(self.token_ids[one], self.logits[one], self.mask_logits[one], self.log_sum[one], self.mask_id)
