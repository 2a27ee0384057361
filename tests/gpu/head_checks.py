"""What must hold for the vocabulary head on any device: logits within float32's error, and the best of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from head_helpers import EPS, HeadAttributesC, HeadCase, assert_head

from .spaces import Array, Space

Results = tuple[np.ndarray, np.ndarray, np.ndarray]


class LoadedHead:
    """A case on a device."""

    def __init__(self, space: Space, case: HeadCase) -> None:
        self._space, self.case = space, case
        self._inputs = [space.array(part) for part in (case.hidden, case.norm, case.weight, case.logit_rows)]
        wanted = case.logit_rows.shape
        self._outputs = [space.empty(wanted, np.int64), space.empty(wanted, np.float32),
                         space.empty((wanted[0], case.kept, len(case.weight)), np.float32)]
        self._workspace = space.empty((space.library.head_workspace_bytes(case.shape),), np.uint8)

    def enqueue(self, stream: int) -> None:
        """One call."""
        arrays: list[Array] = [*self._inputs, *self._outputs, self._workspace]
        self._space.head(self.case.shape, HeadAttributesC(EPS, self.case.mask_id), [x.address for x in arrays], stream)

    def results(self, run: Callable[[int], None]) -> Results:
        """Ids, confidence and logits after `run` on poisoned outputs and scratch memory."""
        stream = self._space.stream
        for array in (*self._outputs, self._workspace):
            array.poison(stream)
        run(stream)
        ids, confidence, logits = (array.get(stream) for array in self._outputs)
        self._workspace.get(stream)  # its fence
        return ids, confidence, logits


def check_head(space: Space, case: HeadCase, runs: int = 3) -> None:
    """Right, with the same bits in every run and from a recorded graph."""
    loaded = LoadedHead(space, case)
    first = loaded.results(loaded.enqueue)
    assert_head(case, first)
    graph = space.recorded(loaded.enqueue)
    for number in range(runs):
        again = loaded.results((lambda stream: space.replay(graph, stream)) if number % 2 else loaded.enqueue)
        assert [part.tobytes() for part in again] == [part.tobytes() for part in first]
    space.device.free_graph(graph)
