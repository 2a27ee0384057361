"""The manifest of a bundle, schema version 2 (docs/bundle.md is its normative description)."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from ..description import (
    ExpertQuantisation,
    ExportPrecision,
    Frozen,
    ModelDescription,
    Precision,
    RoutingDescription,
    WeightFormats,
)
from .consistent import check_dense_size, check_engine, check_formats, check_graphs, check_numbers, check_once
from .contract import KEPT
from .layout import ExpertsEntry, check_expert_layout
from .nodes import nodes_of
from .origin import CheckpointEntry, TokenizerEntry

SCHEMA_VERSION = 2
MANIFEST_NAME = "manifest.json"


class FileEntry(Frozen):
    """One file of the bundle."""

    path: str
    size: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")

    @field_validator("path")
    @classmethod
    def _inside(cls, value: str) -> str:
        path = PurePosixPath(value)
        if path.is_absolute() or ".." in path.parts or not path.parts or "\\" in value or not value.isprintable():
            raise ValueError(f"path {value[:100]!r} leaves the bundle, or has characters that cannot be shown")
        return value


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


class ProfileEntry(Frozen):
    """An optimization profile: least, usual and largest size of each symbolic dimension."""

    name: Literal["prefill", "denoise", "salient"]
    batch: tuple[int, int, int]
    tokens: tuple[int, int, int]
    past: tuple[int, int, int]
    rows: tuple[int, int, int]


class WeightInput(Frozen):
    """A weight that is an engine input, bound at run time from a file of the bundle."""

    name: str
    file: str
    offset: int = Field(ge=0)
    bytes: int = Field(gt=0)
    dtype: str
    shape: list[int]


class ExpertPool(Frozen):
    """Engine inputs of one MoE layer's resident experts; `gate_up`, `down` and scales are its weight inputs [E, …]."""

    slot_of_expert: str = Field(description="int32 [E]: an expert's slot, −1 = none")
    gate_up: str
    down: str
    gate_up_pool: str = Field(description="[P, …], P slots, otherwise as gate_up")
    down_pool: str
    gate_up_scales: str | None = Field(None, description="null where experts are not quantised")
    down_scales: str | None = None
    gate_up_scales_pool: str | None = None
    down_scales_pool: str | None = None

    @model_validator(mode="after")
    def _all_scales_or_none(self) -> ExpertPool:
        scales = [self.gate_up_scales, self.down_scales, self.gate_up_scales_pool, self.down_scales_pool]
        if any(scales) and not all(scales):
            raise ValueError("a pool of quantised experts has four tensors of scales")
        return self

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Each weight input and its pool, in the order in which the plugin takes them."""
        pairs = [(self.gate_up, self.gate_up_pool), (self.down, self.down_pool)]
        for weight, pool in ((self.gate_up_scales, self.gate_up_scales_pool),
                             (self.down_scales, self.down_scales_pool)):
            if weight and pool:
                pairs.append((weight, pool))
        return pairs


class NetworkEntry(Frozen):
    """What TensorRT's own objects said of an engine's network before it was built; open dimensions are −1."""

    inputs: list[TensorEntry]
    outputs: list[TensorEntry]
    profiles: list[dict[str, list[list[int]]]] = Field(description="least, usual, largest shape of each input with an "
                                                       "open dimension")
    layers: dict[str, int] = Field(description="TensorRT's kinds of layers, counted")


class EngineEntry(Frozen):
    """An engine file and what it needs to run."""

    file: str
    graph: str | None = Field(None, description="file of the salient graph that it is of; null: of the denoiser")
    flavour: Literal["tensorrt", "tensorrt-rtx"]
    version: str = Field(description="of the TensorRT library that built it; another one refuses it")
    targets: list[str] = Field(description="compute capabilities, such as sm89")
    precision: Precision
    experts: Literal["inline", "external", "resident"]
    experts_op: Literal["plugin", "onnx"]
    experts_layout: Literal[1, 2] = Field(1, description="order in which quantised experts are given to it: 1 rows "
                                          "(older engines, which are refused), 2 fragments")
    profiles: list[ProfileEntry]
    plugin_build: str | None = Field(description="build id of the library its plugins come from; null = no plugins")
    plugin_nodes: int = Field(ge=0, description="custom nodes that are plugins")
    fallback_nodes: int = Field(ge=0, description="custom nodes that became their ONNX bodies (--allow-fallback)")
    weight_inputs: list[WeightInput]
    expert_pools: list[ExpertPool] = Field(description="one per MoE layer where experts are resident")
    flags: list[str] = Field(description="hardware-compatible, version-compatible, refit")
    made_from: dict[str, str] = Field(min_length=1, description="sha256 of the graph and data files it was built from")
    network: NetworkEntry

    @property
    def pool_inputs(self) -> list[TensorEntry]:
        """The inputs of `expert_pools` as tensors; P slots."""
        weights = {weight.name: weight for weight in self.weight_inputs}
        inputs = []
        for pool in self.expert_pools:
            inputs.append(TensorEntry(name=pool.slot_of_expert, dtype="int32", shape=[weights[pool.gate_up].shape[0]]))
            inputs += [TensorEntry(name=name, dtype=weights[of].dtype, shape=["P", *weights[of].shape[1:]])
                       for of, name in pool.pairs]
        return inputs


class Manifest(Frozen):
    """Everything a reader needs to know before it opens a file."""

    schema_version: Literal[2] = 2
    created_by: str
    model: ModelDescription
    routing: RoutingDescription
    precision: Precision = Field(description="compute type: of activations, caches, norms and biases")
    weights: WeightFormats | None = Field(None, description="null in older bundles: all in `precision`, and experts as "
                                          "`experts.quantisation` says")
    checkpoint: CheckpointEntry
    denoiser: GraphEntry
    salient: SalientEntry | None = Field(description="null without --salient")
    experts: ExpertsEntry | None = Field(description="null for a dense model")
    tokenizer: TokenizerEntry | None
    files: list[FileEntry]
    engines: list[EngineEntry]
    decode_defaults: dict[str, int | float | bool | str] = Field(
        description="fields of DecodeSettings that the checkpoint's generation_config.json sets")
    warnings: list[str] = Field(description="sentences that the export printed")

    @model_validator(mode="after")
    def _numbers_agree(self) -> Manifest:
        """The manifest has no hash of its own, and who maps the expert file trusts these."""
        model, entry = self.model, self.experts
        sizes = {file.path: file.size for file in self.files}
        check_numbers(model, self.routing)
        check_graphs(self)
        if [layer.layer for layer in entry.layers] != list(model.moe_layers) if entry else len(model.moe_layers):
            raise ValueError("experts are not those of the model's layers")
        if self.weights:
            check_formats(self.weights, self.precision, bool(entry), self.quantisation, model.tie_embeddings)
        formats = self.formats
        if entry:
            check_expert_layout(entry, model, formats, self.precision, sizes.get(entry.file))
        data = f"{self.denoiser.file}.data"
        check_dense_size(model, formats, self.precision, data, sizes.get(data))
        check_once((str(PurePosixPath(file.path)) for file in self.files), "file")
        check_once((engine.file for engine in self.engines), "engine")
        for engine in self.engines:
            check_engine(engine, [graph.file for graph in self.salient.static] if self.salient else [])
        return self

    @property
    def denoiser_engines(self) -> list[EngineEntry]:
        """Those that open the bundle; the others run salient steps beside one of them."""
        return [engine for engine in self.engines if engine.graph is None]

    def graph_of(self, engine: EngineEntry) -> GraphEntry:
        """What an engine was built from."""
        graphs = self.salient.static if self.salient else []
        return next((graph for graph in graphs if graph.file == engine.graph), self.denoiser)

    @property
    def bytes_per_expert(self) -> int:
        """Bytes that using one expert touches; 0 for a dense model."""
        return self.experts.bytes_per_expert if self.experts else 0

    @property
    def quantisation(self) -> ExpertQuantisation | None:
        """How routed experts are quantised, if they are."""
        return self.experts.quantisation if self.experts else None

    @property
    def formats(self) -> WeightFormats:
        """How weights are stored, of older bundles too."""
        if self.weights:
            return self.weights
        formats, how = WeightFormats.all_as(self.precision, self.experts is not None), self.quantisation
        return formats.model_copy(update={"experts": how.name, "group_size": how.group_size}) if how else formats

    @property
    def export_precision(self) -> ExportPrecision:
        """What `export --precision` said: of experts, or of a dense model's linear layers."""
        return self.formats.experts or self.formats.dense

    @property
    def precision_in_words(self) -> str:
        """Such as "fp32", "fp32, weights bf16" or "fp32, experts int4, in groups of 64"."""
        return self.formats.in_words(self.precision)

    @property
    def only_on_cpus(self) -> bool:
        """Whether weights are stored in a way that kernels of GPUs do not read: dense parts in other types than what
        is computed with, or experts in other floats."""
        formats = self.formats
        return (any(stored != self.precision for part, stored in formats.parts.items() if part != "experts")
                or (formats.experts not in (None, self.precision) and not self.quantisation))
