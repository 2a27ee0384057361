"""What a build is asked to do, and whether that makes sense for the bundle at hand."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from ..bundle.engine_entries import ProfileEntry
from ..bundle.graph_entries import GraphEntry
from ..bundle.manifest import Manifest
from ..description import MOST_OPEN
from ..errors import InputError

FlavourName = Literal["tensorrt", "tensorrt-rtx"]
ExpertsPlace = Literal["inline", "external", "resident"]
ExpertsOp = Literal["plugin", "onnx"]
SLOTS = "P"
"""Dimension of slot pools."""
FLAGS = ("hardware-compatible", "version-compatible", "refit")

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class BuildSettings:
    """Options of `dmoe-export build`; `workspace` is bytes of device scratch memory."""

    targets: tuple[str, ...] = ()  # compute capabilities such as sm89; empty: the flavour's default
    max_batch: int = 1
    max_prefill: int | None = None  # tokens of a prefill forward; None: 512, full-canvas models max_context, or less
    max_context: int | None = None  # cached tokens; None: 4096, full-canvas models 2048, or what the model takes
    experts: ExpertsPlace = "external"
    experts_op: ExpertsOp = "plugin"
    experts_capacity: int | None = None  # of experts_op onnx: experts in one round; None chooses
    workspace: int = 4 << 30
    optimization_level: int | None = None
    allow_fallback: bool = False
    flags: tuple[str, ...] = ()
    salient: bool = True  # engines of the salient graphs of static shapes, too


def parse_size(text: str) -> int:
    """Bytes of a size such as 512M or 4G; raises InputError."""
    match = re.fullmatch(r"([0-9]{1,18})([KMG]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not match or not int(match[1]):
        raise InputError(f"Size {text!r} is not understood; write a number with K, M or G, such as 4G.")
    return int(match[1]) * _UNITS[match[2].upper()]


def parse_targets(text: str) -> tuple[str, ...]:
    """Targets of a list such as sm80,sm89 (or 8.0,8.9), sorted, once each; raises InputError."""
    targets = set()
    for part in filter(None, (p.strip().lower() for p in text.split(","))):
        number = part.removeprefix("sm").replace("_", "").replace(".", "")
        if not re.fullmatch("[0-9]{2,3}", number):
            raise InputError(f"Target {part!r} is no compute capability; write for example sm80,sm89,sm120.")
        targets.add(f"sm{number}")
    if not targets:
        raise InputError("No target was given; write for example --targets sm80,sm89.")
    return tuple(sorted(targets, key=lambda t: int(t[2:])))


def resolved(settings: BuildSettings, manifest: Manifest) -> BuildSettings:
    """The settings with the bundle's defaults filled in; refuses what cannot become an engine of it (InputError)."""
    block, positions = manifest.step_tokens, manifest.model.max_positions
    full = manifest.model.attention == "full"  # then a forward may take the whole canvas
    context = settings.max_context or min(2048 if full else 4096, positions)
    prefill = settings.max_prefill or max(1, (context if full else min(512, positions)) // block) * block
    settings = replace(settings, max_context=context, max_prefill=prefill)
    _check(settings, manifest)
    return settings


def _check(settings: BuildSettings, manifest: Manifest) -> None:
    """One sentence for each thing that does not fit."""
    block, positions = manifest.step_tokens, manifest.model.max_positions
    word = "canvas" if manifest.model.canvas else "block"
    assert settings.max_prefill and settings.max_context
    if not 1 <= settings.max_batch <= 1024:
        raise InputError(f"--max-batch {settings.max_batch} is outside 1 … 1024.")
    if settings.max_prefill < block or settings.max_prefill % block:
        raise InputError(f"--max-prefill {settings.max_prefill} is no multiple of the {word} length {block}.")
    if not block <= settings.max_context <= positions:
        raise InputError(f"--max-context {settings.max_context} is outside {block} … {positions}, the {word} length "
                         "and the model's positions.")
    if settings.optimization_level is not None and not 0 <= settings.optimization_level <= 5:
        raise InputError(f"--builder-optimization-level {settings.optimization_level} is outside 0 … 5.")
    if manifest.only_on_cpus:
        raise InputError(f"The bundle is {manifest.precision_in_words}, which CPUs alone read; for a GPU run: "
                         "dmoe-export build CHECKPOINT --out BUNDLE --precision fp16.")
    if manifest.model.moe and settings.experts_op == "plugin" and manifest.precision == "fp32":
        if manifest.quantisation:
            raise InputError("The experts plugin computes in fp16 or bf16, and all but the experts of this bundle is "
                             "fp32; export with --compute fp16 --dense-precision fp16.")
        raise InputError("The experts plugin computes in fp16 or bf16 and the bundle is fp32; export with --precision "
                         "fp16 --compute fp16, or build with --experts-op onnx.")
    if manifest.quantisation and (settings.experts_op == "onnx" or settings.allow_fallback):
        raise InputError(f"{manifest.quantisation.name} experts need the experts plugin, which alone reads them; leave "
                         "--experts-op onnx and --allow-fallback out.")
    if manifest.precision == "bf16" and "sm75" in settings.targets:
        raise InputError("Target sm75 has no bfloat16 units; export with --precision fp16, or leave sm75 out.")
    if settings.experts_capacity is not None and settings.experts_op != "onnx":
        raise InputError("--experts-capacity belongs to --experts-op onnx; the plugin takes any number of experts.")
    moe = manifest.model.moe
    if moe is None and settings.experts_capacity is not None:
        raise InputError("--experts-capacity has no meaning here: the model is dense.")
    if moe and settings.experts_capacity is not None and not 1 <= settings.experts_capacity <= moe.num_experts:
        raise InputError(f"--experts-capacity {settings.experts_capacity} is outside 1 … {moe.num_experts}.")
    if settings.experts == "resident":
        if moe is None:
            raise InputError("--experts resident has no meaning here: the model is dense.")
        if settings.experts_op == "onnx" or settings.allow_fallback:
            raise InputError("--experts resident needs the experts plugin, which alone reads a slot pool; leave "
                             "--experts-op onnx and --allow-fallback out.")
    copies = len(graphs_to_build(settings, manifest))
    if moe and settings.experts == "inline" and copies > 1:
        raise InputError(f"--experts inline would put all experts into each of {copies} engines, those of salient "
                         "steps among them, which share experts outside; leave it out, or give --no-salient.")
    if "refit" in settings.flags and manifest.quantisation:
        raise InputError(f"--refit puts weights into an engine as a file has them, and {manifest.quantisation.name} "
                         "experts lie in another order there; leave --refit out.")
    if "refit" in settings.flags and settings.experts != "inline":
        raise InputError(f"--refit has nothing to do with --experts {settings.experts}: those weights are read "
                         "from the bundle's files whenever the engine is opened; use --experts inline, or leave "
                         "--refit out.")


def graphs_to_build(settings: BuildSettings, manifest: Manifest) -> list[GraphEntry]:
    """The denoiser, and what salient steps run."""
    return [manifest.denoiser, *(manifest.salient.static if manifest.salient and settings.salient else [])]


def profiles(settings: BuildSettings, manifest: Manifest, graph: GraphEntry) -> tuple[ProfileEntry, ...]:
    """Of resolved settings; least, usual and largest size per dimension.

    The denoiser's are prefill (index 0) and denoise (index 1): a step of a block may take the block before along; where
    everything sees the whole canvas none does, and a canvas of random tokens has nothing of its phase before it. A
    salient graph runs one sequence, and lists M rows, so no fewer tokens. A graph that opens blocks predicts all of
    them, two at most in a step that is as fast as others.
    """
    assert settings.max_prefill and settings.max_context
    n = manifest.step_tokens
    full = manifest.model.attention == "full"
    steps = min(2 * n, manifest.model.max_positions) if manifest.model.attention == "block_causal" else n
    batch = (1, 1, settings.max_batch)
    past = (1, max(1, settings.max_context // 4), settings.max_context)
    if graph.file != manifest.denoiser.file:
        assert manifest.salient
        least = next((entry.capacity for entry in manifest.salient.fixed if entry.graph.file == graph.file), 1)
        usual, most = (settings.max_prefill, settings.max_prefill) if full else (n, steps)
        return (ProfileEntry(name="salient", batch=(1, 1, 1), tokens=(least, max(least, usual), max(least, most)),
                             past=past, rows=(1, n, n)),)
    wide, narrow = (min((1 + MOST_OPEN) * n, settings.max_prefill), steps) if graph.opens_blocks else (n, n)
    return (
        ProfileEntry(name="prefill", batch=batch, tokens=(n, settings.max_prefill, settings.max_prefill), past=past,
                     rows=(1, n, wide)),
        ProfileEntry(name="denoise", batch=batch, tokens=(n, n, steps), past=past, rows=(1, n, narrow)))


def sizes_of(profile: ProfileEntry, manifest: Manifest) -> dict[str, tuple[int, int, int]]:
    """Least, usual and largest size of each symbolic dimension of a graph and its inputs."""
    moe = manifest.model.moe
    slots = {SLOTS: (1, max(1, moe.num_experts // 4), moe.num_experts)} if moe else {}  # any number
    return {"B": profile.batch, "T": profile.tokens, "S": profile.past, "M": profile.rows,
            "L": (1, 1, profile.rows[2]), **slots}
