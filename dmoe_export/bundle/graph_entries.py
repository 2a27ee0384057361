"""A bundle's ONNX graphs, as its manifest says: inputs, outputs, custom ops, and the graphs of salient steps."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated

from pydantic import Field, model_validator

from ..description import Frozen
from .contract import ATTENTION_POSITIONS, KEPT
from .nodes import nodes_of


class TensorEntry(Frozen):
    """A graph input or output; symbolic dimensions are names."""

    name: str
    dtype: str
    shape: list[int | str]


class OpEntry(Frozen):
    """A custom op and how many nodes of the graph use it."""

    name: str
    domain: str
    version: int
    count: int = Field(ge=1)
    inside: dict[str, Annotated[int, Field(ge=1, le=100)]] = Field(
        {}, description="ops in the body of one node, and how many nodes of each")


class GraphEntry(Frozen):
    """An ONNX graph."""

    file: str
    opset: int
    inputs: list[TensorEntry]
    outputs: list[TensorEntry]
    ops: list[OpEntry]

    def nodes(self, served: Collection[str]) -> dict[str, int]:
        """How many nodes of each op there are where a library has kernels for the ops named, and others are bodies."""
        return nodes_of({op.name: op.count for op in self.ops}, {op.name: op.inside for op in self.ops}, served)

    @property
    def keeps_logits(self) -> bool:
        """Whether logits leave for the first wanted tokens alone (input `logits_kept`); in older graphs for all."""
        return any(entry.name == KEPT for entry in self.inputs)

    @property
    def opens_blocks(self) -> bool:
        """Whether blocks may see one another (input `attention_positions`): multi-block editing."""
        return any(entry.name == ATTENTION_POSITIONS for entry in self.inputs)


class CapacityEntry(Frozen):
    """A salient graph of static shapes."""

    capacity: int = Field(gt=0, description="M: rows of a sequence that a layer recomputes at most")
    graph: GraphEntry


class SalientEntry(Frozen):
    """The graphs of salient-token decoding, over the same data files as the denoiser."""

    graph: GraphEntry = Field(description="as many rows as are salient")
    fill: GraphEntry | None = Field(description="dense steps of static shapes; there if `fixed` is not empty")
    fixed: list[CapacityEntry]

    @model_validator(mode="after")
    def _fill_where_needed(self) -> SalientEntry:
        if self.fixed and self.fill is None:
            raise ValueError("graphs of fixed capacity need a fill graph")
        return self

    @property
    def graphs(self) -> list[GraphEntry]:
        """All of them."""
        return [self.graph, *self.static]

    @property
    def static(self) -> list[GraphEntry]:
        """Those of static shapes, which engines are built of."""
        return [*([self.fill] if self.fill else []), *(entry.graph for entry in self.fixed)]
