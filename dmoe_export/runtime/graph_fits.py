"""Whether a graph is the one that its manifest describes: what its session declares, and what it gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..bundle.manifest import GraphEntry
from ..description import ModelDescription
from ..errors import BundleError

_NUMPY = {"float": "float32"}  # else the same word


def check_declared(session: Any, graph: GraphEntry, name: str) -> None:
    """Raise BundleError unless a session of ONNX Runtime takes and gives what the manifest says."""
    for what, entries, found in (("input", graph.inputs, session.get_inputs()),
                                 ("output", graph.outputs, session.get_outputs())):
        said = [f"{entry.name} {entry.dtype} {list(entry.shape)}" for entry in entries]
        has = [f"{arg.name} {arg.type.removeprefix('tensor(').rstrip(')')} {list(arg.shape)}" for arg in found]
        different = [pair for pair in zip(said, has, strict=False) if pair[0] != pair[1]]
        if different or len(said) != len(has):
            one, other = different[0] if different else (f"{len(said)} {what}s", f"{len(has)}")
            raise _wrong(name, f"its {what} is {_plain(other)} where the manifest has {one}" if different else
                         f"it has {other} {what}s where the manifest has {one}")


class Results:
    """What a graph must give for what it takes."""

    def __init__(self, graph: GraphEntry, model: ModelDescription, name: str) -> None:
        self._inputs = [entry for entry in graph.inputs if any(isinstance(size, str) for size in entry.shape)]
        self._outputs = {entry.name: (_NUMPY.get(entry.dtype, entry.dtype), entry.shape) for entry in graph.outputs}
        self._bounds = {"token_ids": (0, model.vocab_size), "sampled_ids": (0, model.vocab_size),
                        "expert_ids": (-1, model.moe.num_experts if model.moe else 0)}
        self._name = name

    def check(self, feeds: Mapping[str, Any], wanted: Sequence[str], results: Sequence[Any]) -> None:
        """Raise BundleError for another type or shape, and for ids that are none: they are indices later."""
        sizes: dict[int | str, int] = {}
        for entry in self._inputs:
            sizes.update(zip(entry.shape, feeds[entry.name].shape, strict=True))
        for name, value in zip(wanted, results, strict=True):
            dtype, shape = self._outputs[name]
            if value.dtype.name != dtype or value.shape != tuple([sizes.get(size, size) for size in shape]):
                raise _wrong(self._name, f"it gave {name} as {value.dtype.name} {list(value.shape)} where {dtype} "
                             f"{[sizes.get(size, size) for size in shape]} was due")
            if name in self._bounds and value.size:
                low, high = self._bounds[name]
                if value.min() < low or value.max() >= high:
                    raise _wrong(self._name, f"it gave {name} outside {low} … {high - 1}")


def _wrong(name: str, what: str) -> BundleError:
    return BundleError(f"{name} does not fit the manifest: {what}; copy or export the bundle again.")


def _plain(text: str) -> str:
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text[:200])
