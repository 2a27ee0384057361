"""How an op is declared; the eager implementation, the ONNX body and the plugin all follow the declaration."""

from __future__ import annotations

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
    optional: tuple[str, ...] = ()  # attributes that a node has only where they are not what is usual

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
