"""How many nodes of each op a library of kernels is asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping


def nodes_of(ops: Mapping[str, int], inside: Mapping[str, Mapping[str, int]],
             served: Collection[str]) -> dict[str, int]:
    """Nodes of each op where a library has kernels for the ops `served`, and every other one is its body.

    `ops`: nodes of a graph; `inside`: nodes in the body of an op, which are no bodies with more inside.
    """
    counts: Counter[str] = Counter()
    for name, count in ops.items():
        counts[name] += count
        if name not in served:
            counts.update({inner: count * each for inner, each in inside.get(name, {}).items()})
    return dict(counts)
