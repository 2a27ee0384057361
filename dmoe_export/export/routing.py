"""How a bundle routes: what the checkpoint was trained with, unless another mode is asked for.

config.json of LLaDA2-MoE checkpoints tells (spec llada2_1_2_2.md; the dMoE reference's configuration class):
`core_threshold` (with `mode` "aggregate", the only one its reference has) is dMoE's top_p with that p;
`expert_capacity` is LLaDA2.2's top_c with that C, its routing block is `block_size`; neither is token routing. dMoE's
training writes a `core_size`, too, which none of its code reads. Its reference knows no block length but 32.

The block length is `block_size` of config.json; else what the checkpoint's name ends in, where a family's releases are
called so (SDAR's …-b32); else the family's usual one.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from ..checkpoint.config_fields import Fields, shown
from ..checkpoint.family import Checkpoint
from ..description import RUNTIME_SETTINGS, RoutingChoice, RoutingDescription, RoutingMode
from ..errors import CheckpointError, InputError
from .model_card import source_name

_OPTIONS = {"top_p": "--coreset-top-p", "min_experts": "--min-experts", "coreset_size": "--coreset-size"}


class TrainedRouting(NamedTuple):
    """What config.json says of a model with experts."""

    mode: RoutingMode
    why: str
    top_p: float = 0.6
    coreset_size: int | None = None


class TrainedBlock(NamedTuple):
    """The block length that config.json or the checkpoint's name says; None where neither does."""

    length: int | None
    why: str = ""
    warnings: tuple[str, ...] = ()


def choose_routing(source: Checkpoint, mode: RoutingChoice | None, block_length: int | None,
                   settings: dict[str, float | None]) -> tuple[RoutingDescription, list[str]]:
    """The routing of a bundle, and sentences to warn with. Raises CheckpointError, InputError.

    `mode` auto or None: as trained; `block_length` None: the checkpoint's, a canvas, else its family's; `settings` are
    `top_p`, `min_experts`, `coreset_size`, None where nothing was asked for.
    """
    d, asked = source.description, None if mode == "auto" else mode
    chosen = {name: value for name, value in settings.items() if value is not None}
    trained = trained_routing(source) if d.moe else None
    trained_block = _trained_block(source, trained)
    usual = d.canvas.length if d.canvas else source.family.block_length
    length = block_length if block_length is not None else trained_block.length or usual
    if length < 1:
        raise CheckpointError(f"Block length {length} is not positive; most models of family {d.family} use {usual}.")
    if length > d.max_positions:
        raise CheckpointError(f"Block length {length} is more than the model's {d.max_positions} positions; most "
                              f"models of family {d.family} use {usual}.")
    warnings = list(trained_block.warnings) if block_length is None else []
    if trained is None:
        if asked not in (None, "token") or chosen:
            what = f"routing {asked}" if asked not in (None, "token") else next(iter(chosen))
            raise InputError(f"{source.folder} is a dense model ({d.architecture}): it has no experts to route, so "
                             f"leave {what} out.")
        route = RoutingDescription.default(None, block_length=length)
    else:
        route, said = _routing(source, trained, asked, length, chosen)
        warnings += said
    if trained_block.length not in (None, length):
        warnings.append(f"Block length {length} was asked for and the checkpoint's is {trained_block.length} "
                        f"({trained_block.why}): its tokens would share other blocks than in training, so expect lower "
                        "accuracy, or leave --block-length out.")
    elif source.family.block_in_name and trained_block.why:
        route = route.model_copy(update={"reason": f"{route.reason}{'; ' * bool(route.reason)}block {length}: "
                                                   f"{trained_block.why}"})
    return route, warnings


def trained_routing(source: Checkpoint) -> TrainedRouting:
    """What a checkpoint with experts was trained with. Raises CheckpointError where its fields do not go together."""
    moe, path = source.description.experts, source.folder / "config.json"
    fields = Fields(source.config, path)
    threshold, capacity = (source.config.get(name) for name in ("core_threshold", "expert_capacity"))
    if threshold is not None and capacity is not None:
        raise fields.refuse(f"core_threshold {shown(threshold)} and expert_capacity {shown(capacity)} are two block "
                            "routings, and a model is trained with one; remove the other")
    if threshold is not None:
        fields.only("mode", ("aggregate",))
        p = fields.get("core_threshold", float)
        if not 0 <= p <= 1:
            raise CheckpointError(f"core_threshold {p} in {path} is outside 0 … 1.")
        return TrainedRouting("top_p", f"core_threshold {p:g} in config.json", p)
    if capacity is not None:
        size, block = fields.get("expert_capacity", int), _block_of(fields, capacity)
        if not moe.experts_per_token <= size <= moe.num_experts:
            raise fields.refuse(f"expert_capacity {size} is outside {moe.experts_per_token} … {moe.num_experts}, the "
                                "experts of a token and of a layer; correct it")
        if moe.score_function != "sigmoid" or not moe.expert_bias:
            raise fields.refuse(f"expert_capacity {size} is LLaDA2.2's block routing, which is defined for sigmoid "
                                "scores with an expert bias; this family has others, so remove it")
        return TrainedRouting("top_c", f"expert_capacity {size} and block_size {block} in config.json",
                              coreset_size=size)
    if source.config.get("mode") == "aggregate":
        raise fields.refuse("mode is 'aggregate', which is dMoE's block routing, and core_threshold is missing; add "
                            "the p it was trained with")
    return TrainedRouting("token", "no core_threshold or expert_capacity in config.json")


def _block_of(fields: Fields, capacity: object) -> int:
    """The routing block of a checkpoint with an `expert_capacity`."""
    if fields.config.get("block_size") is None:
        raise fields.refuse(f"expert_capacity {shown(capacity)} is block routing, and block_size is missing; add the "
                            "block length it was trained with")
    block = fields.positive("block_size")
    if block & (block - 1):
        raise fields.refuse(f"block_size {block} is no power of two, which expert_capacity demands; correct it")
    return block


def _trained_block(source: Checkpoint, trained: TrainedRouting | None) -> TrainedBlock:
    """Of a block-causal model; elsewhere a `block_size` would mean something else."""
    if source.description.attention != "block_causal":
        return TrainedBlock(None)
    family, name = source.family, source_name(source.folder).rpartition("/")[2]
    ending = re.search(r"-b([0-9]{1,4})$", name) if family.block_in_name else None
    if source.config.get("block_size") is not None:
        size = Fields(source.config, source.folder / "config.json").positive("block_size")
        said = (f"config.json says block_size {size} and the name {name} says {ending[1]}; the bundle takes {size}, so "
                "if the name is right, export with --block-length "
                f"{ending[1]}.",) if ending and int(ending[1]) != size else ()
        return TrainedBlock(size, "block_size in config.json", said)
    if ending and int(ending[1]):
        return TrainedBlock(int(ending[1]), f"config.json says none, the name {name} does")
    if trained and trained.mode == "top_p":
        return TrainedBlock(32, "the only one of dMoE's reference")
    if family.block_in_name:
        usual = family.block_length
        return TrainedBlock(None, "", (
            f"Neither config.json (block_size) nor the name {name} (such as …-b32) says a block length, so the bundle "
            f"takes {usual}, as most releases of this family: a model trained with another answers poorly, so export "
            "it with its --block-length.",))
    return TrainedBlock(None)


def _routing(source: Checkpoint, trained: TrainedRouting, asked: RoutingMode | None, length: int,
             chosen: dict[str, float]) -> tuple[RoutingDescription, list[str]]:
    """Of a model with experts: the description with its reason, and a warning where it is not as trained."""
    moe, mode = source.description.experts, asked or trained.mode
    for name, value in chosen.items():
        low, high = {"top_p": (0, 1), "coreset_size": (moe.experts_per_token, moe.num_experts)}.get(
            name, (1, moe.num_experts))
        if not low <= value <= high:
            raise CheckpointError(f"{name} {value} is outside {low} … {high}.")
        if name not in RUNTIME_SETTINGS[mode]:
            owner = next(m for m, names in RUNTIME_SETTINGS.items() if name in names)
            raise InputError(f"{name} {value} has no meaning under routing {mode} ({trained.why}); leave "
                             f"{_OPTIONS[name]} out, or ask for --routing {owner}.")
    base = RoutingDescription.default(moe, mode, length, trained.top_p)
    if mode == trained.mode == "top_c":
        base = base.model_copy(update={"coreset_size": trained.coreset_size})
    changed = [f"{name} {value:g}" for name, value in chosen.items() if value != getattr(base, name)]
    why, warnings = trained.why, []
    if asked and asked == trained.mode:
        why = f"asked for, as trained: {why}"
    elif asked:
        why = f"asked for; trained with {trained.mode}: {why}"
        warnings = [f"Routing {asked} was asked for and the checkpoint was trained with {trained.mode} "
                    f"({trained.why}): expect lower accuracy, or export with --routing auto."]
    if changed:
        why += f"; {' and '.join(changed)} asked for"
    return base.model_copy(update={**chosen, "reason": why}), warnings
