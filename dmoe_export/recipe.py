"""Recipes: how a known model is exported, decoded, built and checked, in a TOML file (fields: engines/README.md)."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, ValidationError, model_validator

from .bundle.manifest import DecodeValues, PresetName
from .decoding.defaults import first_wrong
from .decoding.settings import OPTIONS
from .description import (
    RUNTIME_SETTINGS,
    ExportPrecision,
    Frozen,
    Precision,
    QuantisedPrecision,
    RoutingChoice,
)
from .engine.settings import ExpertsOp, ExpertsPlace, FlavourName
from .errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).parent / "recipes"  # in the repository a link to engines/, in a wheel the files themselves


class RecipeRouting(Frozen):
    """How a block's experts are chosen; auto and None leave it to the checkpoint."""

    mode: RoutingChoice = "auto"
    block_length: int | None = Field(None, gt=0)
    top_p: float | None = Field(None, ge=0, le=1)
    min_experts: int | None = Field(None, ge=1)
    coreset_size: int | None = Field(None, ge=1)

    def settings(self) -> dict[str, float]:
        """The defaults that it sets for the bundle."""
        values = {name: getattr(self, name) for names in RUNTIME_SETTINGS.values() for name in names}
        return {name: value for name, value in values.items() if value is not None}


class RecipeProfiles(Frozen):
    """Largest sizes an engine takes; rows of a batch, tokens of a row."""

    batch: int = Field(ge=1, le=1024)
    prefill: int = Field(gt=0)
    context: int = Field(gt=0)


class RecipeEngine(Frozen):
    """What is built, for which GPUs."""

    flavour: Literal["auto"] | FlavourName
    targets: tuple[str, ...] = Field((), description="compute capabilities such as sm89; empty: the flavour's default")
    experts: ExpertsPlace = "external"
    experts_op: ExpertsOp = "plugin"


class Tolerances(Frozen):
    """Limits of `dmoe-export check`, against the eager float32 reference."""

    cosine: float = Field(gt=0, le=1, description="least cosine similarity of a row")
    norm_ratio: float = Field(gt=0, lt=1, description="a row's norm is within 1 ± this of the reference's")
    atol: float | None = Field(None, gt=0, description="largest absolute error of an element; None: not a gate")


class Recipe(Frozen):
    """One known model; `name` and `file` come from where it was found."""

    name: str
    file: Path
    checkpoint: str = Field(min_length=1, description="hub id, or a folder that starts with ./ or ../, from the file")
    precision: ExportPrecision
    dense_precision: Precision | None = Field(None, description="with int8 and int4: of everything but routed experts")
    group_size: Literal[32, 64, 128] | None = None
    routing: RecipeRouting = RecipeRouting()
    multi_block_editing: bool = False
    profiles: RecipeProfiles
    engine: RecipeEngine
    check: Tolerances
    decode: DecodeValues = Field({}, description="decode defaults of the bundle, by names of request options")
    presets: dict[PresetName, DecodeValues] = Field({}, description="the bundle's presets")

    @model_validator(mode="after")
    def _can_be_asked_for(self) -> Recipe:
        tables = {"decode": self.decode, **{f"presets.{name}": values for name, values in self.presets.items()}}
        for table, values in tables.items():
            for option, value in values.items():
                if option not in OPTIONS:
                    raise ValueError(f"{table}.{option} = {value!r} is no option of a request; remove it")
        preset, wrong = first_wrong(self.decode, self.presets)
        if wrong:
            raise ValueError(f"{f'presets.{preset}' if preset else 'decode'}.{wrong.removesuffix('.')}")
        return self

    @model_validator(mode="after")
    def _fits(self) -> Recipe:
        mode, block = self.routing.mode, self.routing.block_length or 1
        if mode != "auto" and (wrong := self.routing.settings().keys() - set(RUNTIME_SETTINGS[mode])):
            raise ValueError(f"routing.{min(wrong)} has no meaning with routing.mode {mode}; remove it")
        if self.profiles.prefill % block or self.profiles.context < block:
            raise ValueError(f"profiles.prefill must be a multiple of routing.block_length, {block}, and "
                             "profiles.context no less than it")
        if self.precision not in get_args(QuantisedPrecision) and (self.dense_precision or self.group_size):
            raise ValueError(f"dense_precision and group_size belong to precision int8 or int4, not {self.precision}")
        for target in self.engine.targets:
            if not re.fullmatch(r"sm[0-9]{2,3}", target):
                raise ValueError(f"engine.targets names {target!r}, which is no compute capability such as sm89")
        return self

    @property
    def checkpoint_source(self) -> str:
        """The hub id, or the folder as an absolute path; raises InputError where it does not exist."""
        if not self.checkpoint.startswith(("./", "../", "/")):
            return self.checkpoint
        folder = (self.file.resolve().parent / self.checkpoint).resolve()
        if not folder.is_dir():
            if self.file.parent == FOLDER:
                there = self.checkpoint.lstrip("./")
                raise InputError(f"Recipe {self.name} needs the folder {there} of a checkout of dmoe-export, as an "
                                 f"installation has none; with a checkout, run: dmoe-export build CHECKOUT/{there} "
                                 f"--recipe {self.name}.")
            raise InputError(f"Recipe {self.name} names the checkpoint folder {folder}, which does not exist; give "
                             "another CHECKPOINT on the command line.")
        return str(folder)

    def options(self) -> dict[str, Any]:
        """The values of `dmoe-export build`'s options."""
        return {
            "precision": self.precision, "dense_precision": self.dense_precision, "group_size": self.group_size,
            "routing": self.routing.mode, "block_length": self.routing.block_length,
            "coreset_top_p": self.routing.top_p, "min_experts": self.routing.min_experts,
            "coreset_size": self.routing.coreset_size, "multi_block_editing": self.multi_block_editing or None,
            "max_batch": self.profiles.batch,
            "max_prefill": self.profiles.prefill, "max_context": self.profiles.context,
            "flavour": self.engine.flavour, "targets": ",".join(self.engine.targets) or None,
            "experts": self.engine.experts, "experts_op": self.engine.experts_op}


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_recipe(name: str | Path) -> Recipe:
    """The recipe of that name, or in that .toml file; raises InputError naming file, field and value."""
    path = Path(name)
    if path.suffix != ".toml":
        if str(name) not in recipe_names():
            raise InputError(f"Recipe {str(name)!r} is not known; known: {', '.join(recipe_names())}, or give the path "
                             "of a .toml file.")
        path = FOLDER / f"{name}.toml"
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"Recipe {path} cannot be read: {error.strerror}.") from None
    except ValueError as error:  # bad TOML and bad UTF-8 are both ValueErrors
        raise InputError(f"Recipe {path} is no TOML file: {error}.") from None
    reserved = {"name", "file"} & fields.keys()
    if reserved:
        raise InputError(f"Recipe {path} sets {min(reserved)}, which is taken from the file's name; remove it.")
    try:
        return Recipe(name=path.stem, file=path, **fields)
    except ValidationError as error:
        raise InputError(f"Recipe {path}: {_sentence(error)}") from None


def _sentence(error: ValidationError) -> str:
    """The first thing that is wrong, with field and value."""
    first = error.errors()[0]
    field = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return f"{field} is missing."
    if first["type"] == "extra_forbidden":
        return f"{field} = {first['input']!r} is not a field of a recipe; remove it."
    if not field:
        return first["msg"].removeprefix("Value error, ") + "."
    return f"{field} is {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}."
