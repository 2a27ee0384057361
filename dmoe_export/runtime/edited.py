"""A graph edited in memory, over a bundle's data files: checks and benchmarks open it in place of the bundle's own."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bundle.nodes import nodes_of
from ..bundle.reader import Bundle
from ..errors import BundleError
from ..ops.schema import DOMAIN


@dataclass(frozen=True)
class EditedGraph:
    """A serialised graph, and what ONNX Runtime cannot tell from it."""

    model: bytes
    folder: Path  # its data files are named from there
    ops: dict[str, int]  # nodes of our ops
    inside: dict[str, dict[str, int]]  # in the body of one of them, likewise

    @classmethod
    def of(cls, model: Any, bundle: Bundle) -> EditedGraph:
        """From an onnx.ModelProto, whose data files get the names of their real places.

        Beside a graph that is no file, ONNX Runtime follows no links. Raises BundleError for a data file that the
        manifest does not list: it would be read wherever it is.
        """
        known = {entry.path for entry in bundle.manifest.files}
        entries = [entry for tensor in model.graph.initializer for entry in tensor.external_data
                   if entry.key == "location"]
        if strange := {entry.value for entry in entries} - known:
            raise BundleError(f"A graph of {bundle.folder} takes weights from {min(strange)}, which the manifest does "
                              "not list; export the bundle again.")
        real = {name: Path(os.path.realpath(bundle.folder / name)) for name in {entry.value for entry in entries}}
        folder = os.path.commonpath([path.parent for path in real.values()] or [bundle.folder.absolute()])
        for entry in entries:
            entry.value = os.path.relpath(real[entry.value], folder)
        inside = {function.name: _ours(function) for function in model.functions}
        return cls(model.SerializeToString(), Path(folder), _ours(model.graph), inside)

    def nodes(self, served: Collection[str]) -> dict[str, int]:
        """As `GraphEntry.nodes`."""
        return nodes_of(self.ops, self.inside, served)


def _ours(graph: Any) -> dict[str, int]:
    return dict(Counter(node.op_type for node in graph.node if node.domain == DOMAIN))
