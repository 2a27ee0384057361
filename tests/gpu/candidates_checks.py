"""Ranked candidates on any device: those of the definition, in every run and from a recorded graph."""

from __future__ import annotations

import numpy as np

from dmoe_export.runtime.candidates import best_of
from dmoe_export.runtime.gpu.candidates import CandidateKernel, ShapeC

from .spaces import Space


def check_candidates(space: Space, logits: np.ndarray, mask_id: int, count: int, wanted: int, runs: int = 3) -> None:
    """Of the first `wanted` places of logits [B, L, V]."""
    rows, kept, vocabulary = logits.shape
    kernel, shape = CandidateKernel(space.library.path), ShapeC(rows, wanted, kept, vocabulary, count)
    given = space.array(logits)
    outputs = [space.empty((rows, wanted, count), dtype) for dtype in (np.int32, np.float32)]
    workspace = space.empty((kernel.workspace_bytes(shape),), np.uint8)
    addresses = [array.address for array in (given, *outputs, workspace)]

    def enqueue(stream: int) -> None:
        space._enqueue(stream, lambda: kernel.enqueue(shape, mask_id, *addresses, stream))

    want = best_of(logits[:, :wanted], mask_id, count)
    graph = space.recorded(enqueue)
    for number in range(runs):
        for array in (*outputs, workspace):
            array.poison(space.stream)
        if number % 2:
            space.replay(graph, space.stream)
        else:
            enqueue(space.stream)
        ids, values = (array.get(space.stream) for array in outputs)
        workspace.get(space.stream)  # its fence
        np.testing.assert_array_equal(ids, want.token_ids)
        np.testing.assert_array_equal(values, want.logits)
    space.device.free_graph(graph)
