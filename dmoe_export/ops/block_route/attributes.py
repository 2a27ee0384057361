"""The static half of `DmoeBlockRoute`: what is fixed when a model is exported."""

from __future__ import annotations

from dataclasses import dataclass

from ...description import MoeDescription, RoutingMode
from . import SCHEMA


@dataclass(frozen=True)
class RouteAttributes:
    """Attributes of the node, in the schema's order."""

    mode: RoutingMode
    block_length: int
    experts_per_token: int
    num_groups: int
    groups_kept: int
    routed_scaling: float
    score_function: str = "sigmoid"
    renormalise: bool = True

    @classmethod
    def of(cls, moe: MoeDescription, mode: RoutingMode, block_length: int) -> RouteAttributes:
        """Attributes for a model's MoE layers; `top_c` knows no groups, whatever the model has (LLaDA2.2)."""
        groups, kept = (1, 1) if mode == "top_c" else (moe.num_groups, moe.groups_kept)
        return cls(mode, block_length, moe.experts_per_token, groups, kept, moe.routed_scaling, moe.score_function,
                   moe.renormalise)

    def node_attributes(self) -> dict[str, str | int | float]:
        """As ONNX attributes, plugin attributes included."""
        own = {name: getattr(self, name) for name in SCHEMA.attributes}
        return {**own, "renormalise": int(self.renormalise), **SCHEMA.plugin_attributes}
