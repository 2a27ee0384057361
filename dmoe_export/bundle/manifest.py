"""The manifest of a bundle, schema version 2 (docs/bundle.md is its normative description)."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from ..description import ExportPrecision, Frozen, ModelDescription, Precision, RoutingDescription
from ..weight_formats import ExpertQuantisation, WeightFormats
from .consistent import check_dense_size, check_engine, check_formats, check_graphs, check_numbers, check_once
from .engine_entries import EngineEntry
from .graph_entries import GraphEntry, SalientEntry
from .layout import ExpertsEntry, check_expert_layout
from .origin import CheckpointEntry, TokenizerEntry

SCHEMA_VERSION = 2
DecodeValues = dict[str, int | float | bool | str]
"""Settings of a request by their names in DecodeSettings (decoding/settings.py)."""
PresetName = Annotated[str, Field(pattern="^[a-z][a-z0-9_-]{0,31}$")]
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
    decode_defaults: DecodeValues = Field(
        description="settings where a request says none, of the checkpoint's generation_config.json and of a recipe")
    presets: dict[PresetName, DecodeValues] = Field({}, description="settings under a name that a request can ask "
                                                    "for; they win over decode_defaults. Empty in older bundles")
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
    def step_tokens(self) -> int:
        """Tokens that are decoded together: of a canvas, or of a block."""
        return self.model.step_tokens(self.routing)

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
