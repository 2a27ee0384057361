"""Iterative denoising of a closed batch: all its rows join at the start, each at its own block from there on.

Sources: reference loops of LLaDA2.X, dMoE and Fast-dLLM, with the corrections of spec decoding.md ("What the references
get wrong").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from ..description import Precision
from ..runtime.backend import Backend
from .batch import JoiningBatch
from .limits import check_batch, check_prompt
from .row import FinishReason
from .settings import DecodeSettings
from .telemetry import Statistics
from .template import Template
from .way import PREFILL_TOKENS as PREFILL_TOKENS
from .way import Way

Ends = Callable[[int, list[int], bool], int | None]
"""Prompt, new tokens of its finished block, whether it is the last → how many of them stay, or None: all, and go on."""


@dataclass(frozen=True)
class BlockDecoded:
    """A finished block of one sequence; `finish_reason` is set on the last."""

    index: int
    token_ids: list[int]
    finish_reason: FinishReason | None
    statistics: Statistics


class BlockDiffusion:
    """Decodes a batch of prompts; iterate to get finished blocks as they come."""

    def __init__(self, backend: Backend, settings: DecodeSettings, bytes_per_expert: int = 0,
                 precision: Precision | None = None, bundle: str = "BUNDLE", template: Template | None = None) -> None:
        """As `JoiningBatch`; `template`: of every answer. Raises RequestError for settings that make no sense with the
        backend's model.
        """
        self._backend, self._bundle = backend, bundle
        self._batch = partial(JoiningBatch, bytes_per_expert=bytes_per_expert, precision=precision, bundle=bundle)
        self._way = Way(backend, settings, precision, bundle, template)

    def check(self, prompts: Sequence[Sequence[int]]) -> None:
        """Raise RequestError when so many prompts, or the forwards they take, are more than the backend takes."""
        check_batch(len(prompts), self._backend, self._bundle)
        for i, prompt in enumerate(prompts):
            check_prompt(prompt, self._way, self._backend, self._bundle, i)

    def decode(self, prompts: Sequence[Sequence[int]], cancelled: Callable[[], bool] = lambda: False,
               ends: Ends | None = None) -> Iterator[BlockDecoded]:
        """Prompts of token ids (not empty) → finished blocks; a row's result does not depend on its neighbours.

        Between forwards it looks at the time limit and asks `cancelled`: then every row that is left ends with the
        blocks it has. `ends` may end a row with "stop"; it is asked once for every block, before that is yielded.

        Raises RequestError as `check` does, and NotFiniteError where a row's numbers are NaN or infinite: the whole
        call ends there; blocks that came before stay.
        """
        self.check(prompts)
        batch = self._batch(self._backend, len(prompts))
        rows = [batch.add(list(prompt), self._way, i, partial(ends, i) if ends else None)
                for i, prompt in enumerate(prompts)]
        while len(batch):
            if cancelled():
                for row in rows:
                    batch.cancel(row)
            done = batch.step()
            error = next((one.error for one in done if one.error), None)
            if error is not None:
                raise error
            for one in done:
                yield BlockDecoded(one.handle.row.index, one.token_ids, one.finish_reason, one.statistics)
