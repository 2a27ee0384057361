"""The probability of each token of an answer, as of the step that kept it, and how unsure each step was.

What is said is the model's own: temperature 1, nothing filtered, raised or lowered, all tokens but the mask. It is
conditional on the canvas as that step saw it, so tokens kept together do not know of each other: docs/probabilities.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.backend import Bools, ForwardOutputs, Ints
from ..runtime.candidates import best_of
from .outcome import Chosen
from .row import Row

Spelling = Callable[[int], tuple[str, bytes | None]]
"""Of a token id: how it is shown, and what it adds to a text in UTF-8; None: that depends on its neighbours."""
_LEAST_SHARE = 1e-45  # in float32
_LEAST = np.float32(-1e4)  # below the largest logit: its power is 0, and so is its part of the entropy


@dataclass(frozen=True, slots=True)
class Likely:
    """A token and its log-probability (natural logarithm); text and bytes only of a bundle with a tokenizer."""

    token_id: int
    logprob: float | None  # None: the template gave the token
    token: str | None = None  # U+FFFD where it is a part of a character; a special token by its name
    utf8: bytes | None = None  # what it adds to the text; None: that depends on its neighbours

    def spelled(self, spelling: Spelling) -> dict[str, Any]:
        """Values of `token` and `utf8`."""
        token, utf8 = spelling(self.token_id)
        return {"token": token, "utf8": utf8}

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"token_id": self.token_id, "token": self.token, "logprob": self.logprob,
                "bytes": None if self.utf8 is None else list(self.utf8)}


@dataclass(frozen=True, slots=True)
class TokenProbability(Likely):
    """A token of an answer; `top` are the most probable tokens of its place, best first, at the step that kept it.

    `step` counts the answer's decoding steps from 0, as `Statistics.entropy_by_step` does.
    """

    step: int | None = None  # None: the template gave the token
    top: tuple[Likely, ...] = ()

    def with_text(self, spelling: Spelling) -> TokenProbability:
        """The same with text and bytes."""
        top = tuple(replace(one, **one.spelled(spelling)) for one in self.top)
        return replace(self, **self.spelled(spelling), top=top)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**Likely.as_dict(self), "step": self.step, "top": [one.as_dict() for one in self.top]}


class Recorder:
    """Of one row: sees what each step kept, whatever way to decode chose it."""

    def __init__(self, row: Row, top: int, mask_id: int) -> None:
        """`top`: how many of the most probable tokens are wanted of each place."""
        self._top, self._mask_id = top, mask_id
        self._kept: dict[int, TokenProbability] = {}  # by position
        self._entropies: list[float | None] = []
        row.statistics.entropy_by_step = self._entropies

    def see(self, row: Row, masked: Bools, asked: Ints, chosen: Chosen, outputs: ForwardOutputs, i: int) -> None:
        """A step after it was applied to row i of the outputs; `masked`: the window's places before it.

        A token is kept by the step that wrote it last: one that is replaced, or masked again, is forgotten.
        """
        places, start, step = asked.tolist(), row.window.start, len(self._entropies)
        spread = [spread_of(outputs, i, m, self._mask_id) if masked[place] else None for m, place in enumerate(places)]
        entropies = [one.entropy for one in spread if one]
        self._entropies.append(float(np.mean(entropies)) if entropies else None)
        before = [self._kept.pop(start + place, None) for place in places]
        came = range(len(places)) if chosen.source is None else chosen.source.tolist()
        for place, m in zip(places, came, strict=True):
            position = start + place
            if row.masked[position] or row.given[position]:
                continue
            assert m >= 0, "a place that was put in is masked"
            token, kept = int(row.canvas[position]), before[m]
            if kept is None or kept.token_id != token:
                said = spread[m] or spread_of(outputs, i, m, self._mask_id)
                logprob = said.logprob(token) if said.logits is not None else math.log(
                    max(chosen.confidence[m], _LEAST_SHARE))  # a canvas keeps what it has chosen
                kept = TokenProbability(token, logprob, step=step, top=said.best(self._top, self._mask_id))
            self._kept[position] = kept

    def take(self, row: Row, start: int, tokens: list[int]) -> list[TokenProbability]:
        """Of finished tokens from a position on; they are forgotten."""
        return [TokenProbability(token, None) if row.given[position] else self._kept.pop(position)
                for position, token in enumerate(tokens, start)]


@dataclass(frozen=True)
class Spread:
    """What a forward says of one place; of a canvas of random tokens the entropy alone."""

    entropy: float  # nats
    log_sum: float = 0.0  # ln Σ exp(logit) over all tokens but the mask
    logits: NDArray[np.float32] | None = None  # [V]; None: of a canvas

    def logprob(self, token: int) -> float:
        """Of a token; not of a canvas."""
        assert self.logits is not None
        return float(self.logits[token]) - self.log_sum

    def best(self, count: int, mask_id: int) -> tuple[Likely, ...]:
        """The most probable tokens, as many as there are."""
        if not count or self.logits is None:
            return ()
        found = best_of(self.logits[None, None], mask_id, count)
        return tuple(Likely(int(token), float(logit) - self.log_sum) for token, logit in
                     zip(found.token_ids[0, 0], found.logits[0, 0], strict=True) if np.isfinite(logit))


def spread_of(outputs: ForwardOutputs, i: int, m: int, mask_id: int) -> Spread:
    """Of place m of row i of the outputs."""
    if outputs.canvas is not None:
        return Spread(float(outputs.canvas.entropy[i, m]))
    assert outputs.logits is not None
    logits = outputs.logits[i, m].copy()
    if mask_id >= 0:
        logits[mask_id] = -np.inf
    most = logits.max()
    logits -= most
    np.maximum(logits, _LEAST, out=logits)
    powers = np.exp(logits)  # float32 is faster; sums are in float64
    total = float(powers.sum(dtype=np.float64))
    powers *= logits
    mean = float(powers.sum(dtype=np.float64)) / total
    return Spread(max(0.0, math.log(total) - mean), math.log(total) + float(most), outputs.logits[i, m])
