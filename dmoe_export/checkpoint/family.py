"""What a model family has to say: how its config reads, and where each parameter of our model lies."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError
from torch import Tensor

from ..description import ModelDescription
from ..errors import CheckpointError
from .reader import CheckpointReader, read_config


class WeightMap(Protocol):
    """Where the parameters of `model.Denoiser` lie in one checkpoint."""

    dense: dict[str, str]
    """Parameter name → tensor name, for everything that is not a routed expert."""

    def gate_up(self, layer: int, expert: int) -> tuple[Tensor, Tensor]:
        """Gate [I,H] and up [I,H] of one expert, as stored."""
        ...

    def down(self, layer: int, expert: int) -> Tensor:
        """Down [H,I] of one expert, as stored."""
        ...


class Family(Protocol):
    """A model family of checkpoints."""

    @property
    def name(self) -> str:
        """The family's name, config.json's model_type."""
        ...

    @property
    def architectures(self) -> tuple[str, ...]:
        """Class names of config.json that belong to it."""
        ...

    def describe(self, config: dict[str, Any], source: Path) -> ModelDescription:
        """The model description; contradictions are errors that name `source`."""
        ...

    def weights(self, description: ModelDescription, reader: CheckpointReader) -> WeightMap:
        """The weight map, after checking that every tensor is there with the right shape."""
        ...


class Checkpoint:
    """A described checkpoint: family, config, tensors."""

    def __init__(self, folder: Path, layers: int | None = None) -> None:
        """Read and check the folder; `layers` keeps the first N layers."""
        from .llada2_moe import LLADA2_MOE

        families: tuple[Family, ...] = (LLADA2_MOE,)
        self.folder = folder
        self.config = read_config(folder)
        named = self.config.get("architectures") or [self.config.get("model_type")]
        named = named if isinstance(named, list) else [named]
        family = next((f for f in families if any(name in (*f.architectures, f.name) for name in named)), None)
        if family is None:
            known = ", ".join(a for f in families for a in f.architectures)
            raise CheckpointError(f"{folder / 'config.json'} names architecture {', '.join(map(str, named))}, which is "
                                  f"not supported; known: {known}.")
        try:
            self.full_description = family.describe(self.config, folder / "config.json")
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            raise CheckpointError(f"{folder / 'config.json'}: {field} is {first['input']!r}: {first['msg']}.") from None
        self.description = self.full_description
        if layers is not None:
            self.description = _first_layers(self.full_description, layers)
        self.reader = CheckpointReader(folder)
        self.weights = family.weights(self.description, self.reader)


def _first_layers(description: ModelDescription, layers: int) -> ModelDescription:
    low = description.moe.first_dense_layers + 1
    if not low <= layers <= description.num_layers:
        raise CheckpointError(f"--layers {layers} is not between {low} (the first layer with experts) and "
                              f"{description.num_layers}.")
    return description.model_copy(update={"num_layers": layers})
