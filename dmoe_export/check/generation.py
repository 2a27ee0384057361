"""The same prompts decoded by the reference and by a backend, and the step where they part."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..decoding.loop import BlockDiffusion
from ..decoding.settings import DecodeSettings
from ..decoding.telemetry import Statistics
from ..errors import NotFiniteError
from ..runtime.backend import Backend, ForwardInputs, ForwardOutputs
from ..text.codec import TextCodec
from .inputs import Prompt
from .result import GenerationCheck


@dataclass
class _Watched:
    """A backend that remembers what it was asked and what it answered."""

    backend: Backend
    steps: list[tuple[ForwardInputs, ForwardOutputs]] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def forward(self, inputs: ForwardInputs, cache: Any) -> ForwardOutputs:
        """The backend's forward."""
        outputs = self.backend.forward(inputs, cache)
        self.steps.append((inputs, outputs))
        return outputs


@dataclass(frozen=True)
class _Decoded:
    ids: list[int]
    statistics: Statistics
    steps: list[tuple[ForwardInputs, ForwardOutputs]]

    @property
    def unique(self) -> list[float]:
        """Experts in use per denoise step, mean over layers."""
        return self.statistics.unique_by_phase["denoise"]


class ReferenceTokens:
    """The reference's answers, decoded once for all backends."""

    def __init__(self, reference: Backend, prompts: list[Prompt], new_tokens: int, text: TextCodec | None) -> None:
        self._text, self._new_tokens = text, new_tokens
        self._answers = [(prompt, self._decode(reference, prompt)) for prompt in prompts]

    def compare(self, backend: Backend, tie: float) -> tuple[list[GenerationCheck], int]:
        """Greedy answers of a backend beside the reference's; confidences closer than `tie` are a near tie.

        And how many prompts have no answer, because the backend's numbers end.
        """
        found = []
        for prompt, expected in self._answers:
            with contextlib.suppress(NotFiniteError):
                found.append(self._compare(prompt, expected, self._decode(backend, prompt), tie))
        return found, len(self._answers) - len(found)

    def _decode(self, backend: Backend, prompt: Prompt) -> _Decoded:
        watched = _Watched(backend)
        loop = BlockDiffusion(watched, DecodeSettings(max_new_tokens=self._new_tokens))
        blocks = list(loop.decode([prompt.ids]))
        return _Decoded([i for block in blocks for i in block.token_ids], blocks[-1].statistics, watched.steps)

    def _compare(self, prompt: Prompt, expected: _Decoded, got: _Decoded, tie: float) -> GenerationCheck:
        first = _first_difference(expected.ids, got.ids)
        shown = (lambda ids: self._text.decode(ids)) if self._text else (lambda ids: None)
        return GenerationCheck(
            prompt=prompt.text, prompt_tokens=len(prompt.ids), reference_ids=expected.ids, backend_ids=got.ids,
            reference_text=shown(expected.ids), backend_text=shown(got.ids), first_difference=first,
            reference_forwards=expected.statistics.forwards, backend_forwards=got.statistics.forwards,
            reference_unique_experts=expected.unique, backend_unique_experts=got.unique,
            near_tie=None if first is None else _near_tie(expected.steps, got.steps, tie))


def _first_difference(a: list[int], b: list[int]) -> int | None:
    if a == b:
        return None
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _near_tie(expected: list[tuple[ForwardInputs, ForwardOutputs]],
              got: list[tuple[ForwardInputs, ForwardOutputs]], tie: float) -> bool:
    """Whether the forward that parted the two gave the same numbers: then only a near tie can have decided."""
    last: tuple[ForwardOutputs, ForwardOutputs, np.ndarray] | None = None
    for (inputs, a), (others, b) in zip(expected, got, strict=False):
        if inputs.input_ids.shape != others.input_ids.shape or (inputs.input_ids != others.input_ids).any() or (
                inputs.position_ids != others.position_ids).any():
            break
        if (inputs.logit_rows >= 0).any():  # prefills and commits decide nothing
            last = a, b, inputs.logit_rows >= 0
    if last is None:
        return False
    a, b, wanted = last
    # A token that differs is a near tie when both found theirs equally probable; an acceptance, likewise.
    return bool(np.abs(a.confidence - b.confidence)[wanted].max() <= tie)
