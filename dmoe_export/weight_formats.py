"""How a bundle stores its weights, part by part."""

from __future__ import annotations

import re
from collections import Counter
from typing import Literal

from pydantic import Field, model_validator

from .description import ExportPrecision, Frozen, Precision, QuantisedPrecision


class ExpertQuantisation(Frozen, allow_inf_nan=False):
    """How weights, of experts and of linear layers, are stored as integers: symmetric, a scale per group (ops/experts).
    """

    bits: Literal[8, 4]
    group_size: Literal[32, 64, 128] = Field(description="G: values along the product's inner axis that share a scale")

    @property
    def name(self) -> QuantisedPrecision:
        """int8 or int4."""
        return "int8" if self.bits == 8 else "int4"


_BITS: dict[str, Literal[8, 4]] = {"int8": 8, "int4": 4}
_LINEAR = re.compile(r"\.(attention\.(qkv|q|kv|out)|ffn\.((shared|dense)\.)?(gate|up|gate_up|down))\.weight$")


class WeightFormats(Frozen):
    """How a bundle stores its weights, part by part. Norms and biases have the compute type, routers are float32."""

    dense: ExportPrecision = Field(description="linear layers of attention, shared experts, dense feed-forward")
    head: ExportPrecision = Field(description="the vocabulary head")
    embedding: ExportPrecision
    experts: ExportPrecision | None = Field(description="routed experts; null for a dense model")
    group_size: Literal[32, 64, 128] | None = Field(description="of integers; null where nothing is quantised")
    reason: str = Field("", description="why it is these types: what the checkpoint stores, or that it was asked for")

    @model_validator(mode="after")
    def _groups_where_quantised(self) -> WeightFormats:
        if (self.group_size is None) == any(stored in _BITS for stored in self.parts.values()):
            raise ValueError("weights have a group_size where, and only where, some are integers")
        return self

    @classmethod
    def all_as(cls, precision: Precision, experts: bool) -> WeightFormats:
        """Every part in the same floats."""
        return cls(dense=precision, head=precision, embedding=precision, experts=precision if experts else None,
                   group_size=None)

    @property
    def parts(self) -> dict[str, ExportPrecision]:
        """Each part the model has, and its format."""
        parts = {"dense": self.dense, "head": self.head, "embedding": self.embedding, "experts": self.experts}
        return {part: stored for part, stored in parts.items() if stored}

    def quantisation(self, stored: ExportPrecision | None) -> ExpertQuantisation | None:
        """The integers of a format; None for floats."""
        if stored not in _BITS or self.group_size is None:
            return None
        return ExpertQuantisation(bits=_BITS[stored], group_size=self.group_size)

    def of(self, parameter: str, inner: int, compute: Precision) -> ExportPrecision:
        """How a parameter [..., inner] is stored, by its name in the eager model; routed experts have no such names.

        A linear layer whose inner width takes no groups stays in the compute type.
        """
        if ".router." in parameter:
            return "fp32"
        part = {"embed.weight": "embedding", "lm_head.weight": "head"}.get(parameter)
        if part is None and _LINEAR.search(parameter):
            part = "dense"
        stored = self.parts[part] if part else compute
        how = self.quantisation(stored)
        return compute if how and inner % how.group_size else stored

    def in_words(self, compute: Precision) -> str:
        """Such as "fp32", "fp32, weights bf16" or "fp32, weights int4, head int8, in groups of 64"."""
        usual = Counter(self.parts.values()).most_common(1)[0][0]
        others = {part: stored for part, stored in self.parts.items() if stored != usual}
        words = [compute, *([f"weights {usual}"] if usual != compute else []),
                 *(f"{part} {stored}" for part, stored in others.items())]
        if self.group_size is None:
            return ", ".join(words)
        return ", ".join(words) + f"{',' if len(words) > 2 else ''} in groups of {self.group_size}"
