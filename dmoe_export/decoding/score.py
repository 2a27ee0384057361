"""How probable given answers are: log-probabilities of choices under stated estimators.

A masked model says p(token | what is not masked) of every masked place. `one_pass` sums ln p(x_i) with all places of
the choice masked; `monte_carlo` is LLaDA's bound (mask_sets.py). Under block-causal attention a likelihood is a product
over blocks: a block is masked while those before it have their true tokens, and both estimators are sums over blocks.
Behind a choice its last block is masked, as it is where an answer begins; full-canvas models see nothing behind it.

p is over all tokens but the mask, as every confidence here (LLaDA's code has the mask in the sum).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import fsum, isfinite
from typing import Any

import numpy as np

from ..description import ModelDescription, Precision
from ..errors import NotFiniteError, RequestError
from ..runtime.backend import Backend, ForwardInputs, ForwardOutputs, Ints, Limits
from .finite import reason
from .limits import check_prompt
from .mask_sets import MaskSets, Weights, all_at_once, mask_sets
from .sampling import Reals, without
from .score_settings import ROUTING, EstimatorName, ScoreSettings
from .settings import DecodeSettings
from .way import Way

_MOST_LOGITS = 1 << 28  # bytes of logits that a forward of several rows may give


@dataclass(frozen=True)
class Score:
    """How probable a choice is, in nats. It does not depend on what is scored beside it."""

    log_probability: float  # −inf where the model excludes a token
    token_ids: list[int]  # what was scored
    token_log_probabilities: list[float] | None  # of each token (one_pass)
    is_greedy: bool  # each token is the most probable one where all of the choice (of its block) is masked
    estimator: EstimatorName
    samples: int | None  # sets of masks drawn for each block; None where no chance is in it
    exact: bool  # no chance is in it: one pass, or all sets of masks were computed
    standard_error: float | None  # of the mean (monte_carlo); None where no chance is in it, and of one sample
    forwards: int  # forward passes that computed it; others may have shared them

    @property
    def tokens(self) -> int:
        """How many were scored; log_probability / tokens is the mean that choices of unequal lengths are compared by.
        """
        return len(self.token_ids)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; −inf is null."""
        each = self.token_log_probabilities
        return {**asdict(self), "tokens": self.tokens, "log_probability": _number(self.log_probability),
                "token_log_probabilities": each and [_number(one) for one in each]}


class _Block:
    """The part of a choice that is masked together, and what was computed of it."""

    def __init__(self, places: range, stop: int, sets: MaskSets) -> None:
        """`places`: absolute positions of its tokens; `stop`: the forward's last position is before this."""
        self.places, self.stop, self.sets = np.arange(places.start, places.stop), stop, sets
        self.sums: Weights = np.zeros(len(sets.masked))  # Σ ln p of each set's tokens
        self.alone: Reals = np.zeros(len(places))  # ln p of each token, all masked
        self.greedy = False


class _Choice:
    """A prompt and a choice behind it; positions are absolute."""

    def __init__(self, index: int, prompt: Sequence[int], choice: Sequence[int], d: ModelDescription, n: int,
                 settings: ScoreSettings) -> None:
        self.index, self.token_ids = index, list(choice)
        start, end = len(prompt), len(prompt) + len(choice)
        full = d.attention == "full"
        size = end if full else -(-end // n) * n
        self.canvas = np.full(size, d.barred_id, np.int64)
        self.canvas[:end] = [*prompt, *choice]
        self.blocks: list[_Block] = []
        first = start
        while first < end:
            stop = size if full else (first // n + 1) * n
            places = range(first, min(stop, end))
            sets = (all_at_once(len(places)) if settings.estimator == "one_pass" else
                    mask_sets(len(places), settings.samples, settings.seed, len(self.blocks)))
            self.blocks.append(_Block(places, stop, sets))
            first = stop
        self.cached = self.forwards = 0

    def score(self, settings: ScoreSettings) -> Score:
        """Once all is computed."""
        found = [block.sets.estimate(block.sums) for block in self.blocks]
        value, error = fsum(value for value, _ in found), fsum(variance for _, variance in found)**0.5
        drawn = any(block.sets.drawn for block in self.blocks)
        tokens = [float(one) for block in self.blocks for one in block.alone]
        return Score(value, self.token_ids, tokens if settings.estimator == "one_pass" else None,
                     all(block.greedy for block in self.blocks), settings.estimator,
                     settings.samples if drawn else None, not drawn,
                     error if drawn and settings.samples > 1 and isfinite(value) else None, self.forwards)


class Scorer:
    """Scores choices behind prompts on a backend."""

    def __init__(self, backend: Backend, settings: ScoreSettings, precision: Precision | None = None,
                 bundle: str = "BUNDLE") -> None:
        """`precision` of the model and `bundle`, its place, are for the advice of errors.

        Raises RequestError for a model without masks, and for routing settings that make no sense with it.
        """
        d = backend.description
        if d.canvas:
            raise RequestError(f"Family {d.family} denoises random tokens and has no masks, so no choice has such a "
                               "likelihood; compare its answers with generate.")
        self._backend, self._settings, self._precision, self._bundle = backend, settings, precision, bundle
        # Whose logits are shifted needs the place before a block as a query: no block cache, as in decoding.
        self._caches = d.attention == "block_causal" and not d.logit_shift
        self._way = self._way_of(1)
        most = (backend.limits or Limits()).max_batch
        self._rows = min(settings.batch, most or settings.batch)

    def _way_of(self, tokens: int) -> Way:
        routing = {name: getattr(self._settings, name) for name in ROUTING}
        return Way(self._backend, DecodeSettings(max_new_tokens=tokens, cache="block" if self._caches else "none",
                                                 **routing), self._precision, self._bundle)

    def check(self, prompt: Sequence[int], choices: Sequence[Sequence[int]], index: int = 0) -> None:
        """Raise RequestError for what has no score, or is more than model or engine take; `index`: the prompt's."""
        d = self._backend.description
        for number, choice in enumerate(choices):
            said = f"Choice {number} of prompt {index}"
            if not len(choice):
                raise RequestError(f"{said} is empty; give at least one token.")
            for token in choice:
                if not 0 <= token < d.vocab_size:
                    raise RequestError(f"{said} holds token id {token}, outside the vocabulary 0 … "
                                       f"{d.vocab_size - 1}.")
                if token == d.mask_id:
                    raise RequestError(f"{said} holds token id {token}, the mask, which is never an answer; leave it "
                                       "out.")
            check_prompt(prompt, self._way_of(len(choice)), self._backend, self._bundle, index)

    def scores(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
               cancelled: Callable[[], bool] = lambda: False) -> Iterator[Score]:
        """Pairs of a prompt and a choice, checked before → their scores, in order.

        Between forwards it asks `cancelled`. Raises RequestError where that says so, and NotFiniteError where the
        model's numbers are NaN or infinite.
        """
        for start in range(0, len(pairs), self._rows):
            wave = [_Choice(start + i, *pair, self._backend.description, self._way.block_length, self._settings)
                    for i, pair in enumerate(pairs[start:start + self._rows])]
            self._compute(wave, cancelled)
            for choice in wave:
                yield choice.score(self._settings)

    def _compute(self, wave: list[_Choice], cancelled: Callable[[], bool]) -> None:
        """All that the scores of some choices, each of which has a row of the cache, are made of."""
        cache = self._backend.new_cache(len(wave))
        for number in range(max(len(choice.blocks) for choice in wave)):
            live = [i for i, choice in enumerate(wave) if number < len(choice.blocks)]
            if self._caches:
                self._reach(wave, live, number, cache, cancelled)
            queue = [(i, taken) for i in live for taken in range(len(wave[i].blocks[number].sets.masked))]
            widest = max(len(wave[i].blocks[number].places) for i in live)
            most = max(1, _MOST_LOGITS // (widest * self._backend.description.vocab_size * 4))
            rows = min(self._rows, most)
            for start in range(0, len(queue), rows):
                self._look(cancelled)
                self._forward(wave, queue[start:start + rows], number, cache)

    def _forward(self, wave: list[_Choice], queue: list[tuple[int, int]], number: int, cache: Any) -> None:
        """A forward with a row for each (choice, set of masks)."""
        d = self._backend.description
        rows, wanted = [], []
        for i, taken in queue:
            choice, block = wave[i], wave[i].blocks[number]
            row = choice.canvas[choice.cached:block.stop].copy()
            masked = block.places[block.sets.masked[taken]]
            row[masked - choice.cached] = d.barred_id
            rows.append(row)
            wanted.append(masked - choice.cached - int(d.logit_shift))
        outputs = self._run(wave, [i for i, _ in queue], rows, wanted, cache)
        assert outputs.logits is not None
        for row, (i, taken) in enumerate(queue):
            choice, block = wave[i], wave[i].blocks[number]
            masked, m = block.sets.masked[taken], len(wanted[row])
            self._check_finite(choice, outputs.confidence[row, :m])
            tokens = choice.canvas[block.places[masked]]
            found = _log_probabilities(outputs.logits[row, :m], tokens, d.barred_id)
            block.sums[taken] = fsum(found)
            if not taken:
                block.alone, block.greedy = found, bool((outputs.token_ids[row, :m] == tokens).all())

    def _reach(self, wave: list[_Choice], live: list[int], number: int, cache: Any,
               cancelled: Callable[[], bool]) -> None:
        """Bring into the cache what lies before a block of each choice, once where it is the same."""
        stops = {i: wave[i].blocks[number].stop - self._way.block_length for i in live}
        alike: dict[bytes, list[int]] = {}
        for i in live:
            alike.setdefault(wave[i].canvas[:stops[i]].tobytes(), []).append(i)
        firsts = [same[0] for same in alike.values()]
        while behind := [i for i in firsts if wave[i].cached < stops[i]]:
            self._look(cancelled)
            rows = [wave[i].canvas[wave[i].cached:min(stops[i], wave[i].cached + self._way.chunk)] for i in behind]
            self._run(wave, behind, rows, None, cache)
            for i, row in zip(behind, rows, strict=True):
                wave[i].cached += len(row)
        for first, *others in alike.values():
            for i in [i for i in others if wave[i].cached < stops[i]]:
                cache.write(i, [cache.read(first, wave[i].cached, stops[i])])
                wave[i].cached, wave[i].forwards = stops[i], wave[first].forwards

    def _run(self, wave: list[_Choice], places: list[int], rows: list[Ints], wanted: list[Ints] | None, cache: Any
             ) -> ForwardOutputs:
        """A forward of rows that go on where the choices' rows of the cache end; with none wanted they are committed.
        """
        width = max(map(len, rows))
        ids, positions = np.zeros((len(rows), width), np.int64), np.full((len(rows), width), -1, np.int64)
        asked = np.full((len(rows), max(map(len, wanted)) if wanted else 1), -1, np.int64)
        for i, (place, row) in enumerate(zip(places, rows, strict=True)):
            ids[i, :len(row)] = row
            positions[i, :len(row)] = np.arange(wave[place].cached, wave[place].cached + len(row))
            if wanted:
                asked[i, :len(wanted[i])] = wanted[i]
        inputs = ForwardInputs(ids, positions, asked, self._way.routing, want_logits=wanted is not None,
                               want_keys_values=wanted is None)
        outputs = self._backend.forward(inputs, cache.part(places))
        if wanted is None:
            cache.commit(inputs, outputs, positions >= 0, places)
        for place in set(places):
            wave[place].forwards += 1
        return outputs

    def _look(self, cancelled: Callable[[], bool]) -> None:
        if cancelled():
            raise RequestError("Scoring was cancelled before all choices had their scores; ask again for them.")

    def _check_finite(self, choice: _Choice, numbers: Reals) -> None:
        if not np.isfinite(numbers).all():
            raise NotFiniteError(f"Choice {choice.index} gets no score: the model computes NaN or infinity, "
                                 f"{reason(self._precision)}; find the first such layer with: dmoe-export check "
                                 "BUNDLE.")


def _number(value: float) -> float | None:
    """JSON has no −inf."""
    return value if isfinite(value) else None


def _log_probabilities(logits: Reals, tokens: Ints, mask_id: int) -> Reals:
    """ln p [m] in float64 of logits [m, V] float32; p is over all tokens but the mask."""
    allowed = without(logits, mask_id)
    most = allowed.max(axis=-1)
    total = most + np.log(np.exp(allowed - most[:, None]).sum(axis=-1))
    found: Reals = allowed[np.arange(len(tokens)), tokens] - total
    return found
