"""A bundle's TensorRT engines, as its manifest says: what each was built for, and what is bound at run time."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ..description import Frozen, Precision
from .graph_entries import TensorEntry


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
