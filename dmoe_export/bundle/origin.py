"""Where a bundle's weights and text come from, as its manifest says."""

from __future__ import annotations

from pydantic import Field

from ..description import Frozen


class CheckpointEntry(Frozen):
    """Which checkpoint the bundle was made from."""

    identity: str = Field(description="sha256 over the description and `parts`")
    layers_total: int
    source: str = Field(description="the hub id it was fetched by, or the folder's name")
    parts: list[str] = Field(min_length=1, description="sha256 of what was read outside layers, then of each exported "
                             "layer")


class TokenizerEntry(Frozen):
    """Text side of the model."""

    file: str
    chat_template: str | None
    special_tokens: dict[str, str] = Field(description="what a template knows by name: bos_token, eos_token, …")
