"""`DmoeSelfAttention` in a space, against the eager op: plainly, in a graph, and again and again."""

from __future__ import annotations

import numpy as np
from self_attention_helpers import Case, assert_words_right

from .spaces import Space

Words = tuple[np.ndarray, np.ndarray, np.ndarray]


def check_self_attention(space: Space, case: Case, runs: int = 1, graph: bool = False) -> Words:
    """Raw words of mixed, key and value, the same in every run; `graph`: runs are replays of a recorded one."""
    s, shape = case.sizes, case.sizes.c(case.kind)
    inputs = [x if x is None else space.array(x) for x in case.inputs()]
    cache = (s.rows, s.kv_heads, s.tokens, s.head_dim)
    outputs = [space.empty(sizes, np.uint16) for sizes in ((s.rows * s.tokens, s.heads * s.head_dim), cache, cache)]
    workspace = space.empty((space.library.self_attention_workspace_bytes(shape),), np.uint8)
    addresses = [x if x is None else x.address for x in (*inputs, *outputs, workspace)]

    def work(stream: int) -> None:
        space.self_attention(shape, addresses, stream)

    recorded = space.recorded(work) if graph else None
    found: list[Words] = []
    for _ in range(runs):
        for output in (*outputs, workspace):
            output.poison(space.stream)
        if graph:
            space.replay(recorded, space.stream)
        else:
            work(space.stream)
        mixed, key, value = (output.get(space.stream) for output in outputs)
        workspace.get(space.stream)  # its fence
        found.append((mixed, key, value))
    for again in found[1:]:
        for first, other in zip(found[0], again, strict=True):
            np.testing.assert_array_equal(other, first)
    assert_words_right(case, found[0])
    return found[0]
