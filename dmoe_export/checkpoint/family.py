"""What a model family has to say: how its config reads, and where each parameter of our model lies."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError

from ..description import ModelDescription
from ..errors import CheckpointError
from .config_fields import MOST_SHOWN, shown
from .edit_tokens import check_edit_tokens
from .generation_config import read_generation_config
from .json_file import read_json
from .layout import Layout, StoredWeights
from .quantised_reader import open_tensors


class Family(Protocol):
    """A model family of checkpoints."""

    @property
    def name(self) -> str:
        """Our name of it."""
        ...

    @property
    def model_type(self) -> str:
        """Its model_type in config.json; families may share one."""
        ...

    @property
    def architectures(self) -> tuple[str, ...]:
        """Class names of config.json that belong to it."""
        ...

    @property
    def block_length(self) -> int:
        """Tokens of a block where config.json does not say how many."""
        ...

    @property
    def block_in_name(self) -> bool:
        """Whether releases differ in their block length and those of N tokens are called …-bN."""
        ...

    def describe(self, config: dict[str, Any], source: Path) -> ModelDescription:
        """The model description; contradictions are errors that name `source`."""
        ...

    def layout(self, description: ModelDescription) -> Layout:
        """Where its tensors lie."""
        ...


def family_of(config: dict[str, Any], source: Path) -> Family:
    """The family by the class names of config.json, or by a model_type that belongs to one family alone."""
    from .diffusion_gemma import DIFFUSION_GEMMA
    from .dream import DREAM
    from .llada import LLADA
    from .llada2_moe import LLADA2_MOE
    from .llada_moe import LLADA_MOE
    from .sdar import SDAR, SDAR_MOE

    families: tuple[Family, ...] = (LLADA2_MOE, LLADA, DREAM, LLADA_MOE, SDAR, SDAR_MOE, DIFFUSION_GEMMA)
    named = config.get("architectures") or [config.get("model_type")]
    named = named if isinstance(named, list) else [named]
    found = [f for f in families if any(name in (*f.architectures, f.model_type) for name in named)]
    known = ", ".join(a for f in families for a in f.architectures)
    if not found:
        raise CheckpointError(f"{source} names architecture {_listed(named)}, which is not supported; "
                              f"known: {known}.")
    if len(found) > 1:
        raise CheckpointError(f"{source} names {_listed(named)}, which could be any of "
                              f"{', '.join(a for f in found for a in f.architectures)}; name the architecture.")
    return found[0]


def _listed(names: list[Any]) -> str:
    return ", ".join(str(name) for name in names) if len(repr(names)) <= MOST_SHOWN else shown(names)


class Checkpoint:
    """A described checkpoint: family, config, tensors."""

    def __init__(self, folder: Path, layers: int | None = None) -> None:
        """Read and check the folder; `layers` keeps the first N layers."""
        self.folder = folder
        self.warnings: list[str] = []  # for whoever exports it
        self.config = read_json(folder / "config.json")
        generation = read_generation_config(folder, self.config)
        family = self.family = family_of(self.config, folder / "config.json")
        try:
            described = family.describe(generation.complete(self.config), folder / "config.json")
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            raise CheckpointError(f"{folder / 'config.json'}: {field} is {shown(first['input'])}: "
                                  f"{first['msg']}.") from None
        self.full_description = self.description = generation.add_eos(described)
        self.says_ends = generation.says_ends
        check_edit_tokens(self.description, folder / "config.json")  # none of them may end an answer
        self.decode_defaults, said = generation.decode_defaults(self.full_description)
        self.warnings += said
        if layers is not None:
            self.description = first_layers(self.full_description, layers)
        self.reader = open_tensors(folder, self.config)
        self.warnings += self.reader.warnings
        self.weights = StoredWeights(self.description, self.reader, family.layout(self.description),
                                     self.full_description.num_layers)
        self.warnings += self.weights.warnings


def first_layers(description: ModelDescription, layers: int) -> ModelDescription:
    """The model cut after its first layers; raises CheckpointError when there are not so many, or none with experts."""
    low = description.moe.first_dense_layers + 1 if description.moe else 1
    if not low <= layers <= description.num_layers:
        what = " (the first layer with experts)" if description.moe else ""
        raise CheckpointError(f"--layers {layers} is not between {low}{what} and {description.num_layers}.")
    others = description.global_attention
    kept = tuple(layer for layer in others.layers if layer < layers) if others else ()
    cut = others.model_copy(update={"layers": kept}) if others and kept else None
    return description.model_copy(update={"num_layers": layers, "global_attention": cut})
