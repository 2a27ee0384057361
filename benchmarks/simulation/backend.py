"""A backend that computes nothing and counts the seconds that it would have taken."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from dmoe_export.runtime.backend import Bools, ForwardInputs, ForwardOutputs, Limits

from .steps import StepTimes


class NoCache:
    """Keys and values of nobody."""

    token_bytes = 0

    def part(self, rows: Sequence[int]) -> NoCache:
        """The same."""
        return self

    def commit(self, inputs: ForwardInputs, outputs: ForwardOutputs, take: Bools,
               rows: Sequence[int] | None = None) -> None:
        """Nothing."""

    def clear(self, rows: Sequence[int]) -> None:
        """Nothing."""

    def leave(self, row: int, last: int) -> None:
        """Nothing."""


class TimedBackend:
    """Every token is unsure, so that a block takes all its steps; `spent` grows with every forward."""

    name = "simulated"
    limits: Limits | None = None
    opens_blocks = False

    def __init__(self, steps: StepTimes) -> None:
        self.description, self.routing, self._steps = steps.model, steps.routing, steps
        self.spent = 0.0  # seconds, simulated
        self.real = 0.0  # processor seconds that the simulation itself takes here

    def new_cache(self, rows: int) -> NoCache:
        """No cache."""
        return NoCache()

    def forward(self, inputs: ForwardInputs, cache: NoCache) -> ForwardOutputs:
        """Token 0 everywhere, with probability 0."""
        start = time.thread_time()
        self.spent += self._steps.seconds(inputs)
        self.real += time.thread_time() - start
        shape = inputs.logit_rows.shape
        return ForwardOutputs(np.zeros(shape, np.int64), np.zeros(shape, np.float32),
                              np.zeros((0, *inputs.input_ids.shape, 0), np.int32), None, None)

    def close(self) -> None:
        """Nothing."""
