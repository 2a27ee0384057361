"""Steps of one replica, measured: what each forward did and how long the step of the batch took."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from dmoe_export.bench.serve_load import Asked
from dmoe_export.decoding.telemetry import unique_experts
from dmoe_export.generator import Generator
from dmoe_export.runtime.backend import Backend, ForwardInputs, ForwardOutputs

from .steps import Reals, StepTimes, fit, work


class Watched:
    """A backend, and what its forwards did since `take`; everything else is the backend's own."""

    def __init__(self, backend: Backend) -> None:
        self._backend, self._seen = backend, list[tuple[ForwardInputs, Any]]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def forward(self, inputs: ForwardInputs, cache: Any) -> ForwardOutputs:
        """The backend's, remembered."""
        outputs = self._backend.forward(inputs, cache)
        self._seen.append((inputs, outputs.expert_ids))
        return outputs

    def take(self) -> list[tuple[ForwardInputs, Any]]:
        """Inputs and expert ids of the forwards since the last time."""
        seen, self._seen = self._seen, []
        return seen


@contextmanager
def watched(generator: Generator) -> Iterator[Watched]:
    """The generator's batches that are made inside run on the yielded backend."""
    backend = generator.backend
    generator.backend = Watched(backend)
    try:
        yield generator.backend
    finally:
        generator.backend = backend


class Measured:
    """Steps of one replica: forwards and seconds."""

    def __init__(self) -> None:
        self.inputs: list[ForwardInputs] = []
        self.seconds: list[float] = []
        self.experts: list[float] = []  # distinct ones, means over layers, of a row's block in steps of one block

    def add(self, generator: Generator, asked: Sequence[Asked], rows: int, slots: int) -> None:
        """Bear a load without a server, `rows` requests at a time, each followed at once by the next, until all ended.

        Raises what a request ends with.
        """
        with watched(generator) as backend:
            batch = generator.batch(slots=slots)
            left = list(asked)
            while left or len(batch):
                while left and len(batch) < rows:
                    one = left.pop(0)
                    batch.add(generator.request(one.prompt, **one.options))
                start = time.perf_counter()
                events = batch.step()
                seconds = time.perf_counter() - start
                failed = next((event.error for event in events if event.error), None)
                if failed:
                    raise failed
                forwards = backend.take()
                if len(forwards) == 1:  # none where a step only looked between forwards
                    self._record(*forwards[0], seconds, generator.backend.routing.block_length)

    def _record(self, inputs: ForwardInputs, expert_ids: Any, seconds: float, block_length: int) -> None:
        self.inputs.append(inputs)
        self.seconds.append(seconds)
        if expert_ids.size and inputs.input_ids.shape[1] <= block_length:
            self.experts += [float(unique_experts(expert_ids[:, row]).mean()) for row in range(len(inputs.input_ids))]

    def fitted(self, generator: Generator, what: str) -> StepTimes:
        """A model of these steps; raises RequestError as `fit`."""
        d, routing = generator.backend.description, generator.backend.routing
        of_block = float(np.mean(self.experts)) if self.experts else 0.0
        experts = d.moe.num_experts if d.moe else 0
        did: list[Reals] = [work(one, routing.block_length, of_block, experts) for one in self.inputs]
        return fit(did, self.seconds, what=what, model=d, routing=routing, experts_of_block=of_block)
