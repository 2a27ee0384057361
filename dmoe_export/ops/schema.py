"""How an op is declared; the eager implementation, the ONNX body and the plugin all follow the declaration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

DOMAIN = "dmoe"
PLUGIN_NAMESPACE = "dmoe"
VERSION = 1  # of our ops, and of their domain in a graph
OPSET = 23  # of the standard ops that bodies and graphs are written in


@dataclass(frozen=True)
class OpSchema:
    """Name and signature of a custom op; a plugin's inputs are all mandatory (an empty one breaks TensorRT plugins)."""

    name: str
    version: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: tuple[str, ...]

    @property
    def qualified_name(self) -> str:
        """`domain::Name`, as torch.onnx wants it."""
        return f"{DOMAIN}::{self.name}"

    @property
    def plugin_attributes(self) -> dict[str, str]:
        """The two attributes by which TensorRT's parser finds a plugin (spec engines.md, "One node, three lives")."""
        return {"plugin_namespace": PLUGIN_NAMESPACE, "plugin_version": str(self.version)}


def int64s(*values: int) -> str:
    """ONNX text of a one-dimensional int64 constant (ONNX Runtime 1.23 infers no shape from `value_ints`)."""
    return f"Constant <value = int64[{len(values)}] {{{', '.join(map(str, values))}}}> ()"


def nodes_of(ops: Mapping[str, int], inside: Mapping[str, Mapping[str, int]], served: Collection[str]) -> dict[str, int]:
    """Nodes of each op where a library has kernels for the ops `served`, and every other one is its body.

    `ops`: nodes of a graph; `inside`: nodes in the body of an op, which are no bodies with more inside.
    """
    counts: Counter[str] = Counter()
    for name, count in ops.items():
        counts[name] += count
        if name not in served:
            counts.update({inner: count * each for inner, each in inside.get(name, {}).items()})
    return dict(counts)
