"""The check of a bundle, from its folder to the report: identity first, then weights, numbers and engines."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

from ..bundle.consistent import part_bytes
from ..bundle.hub import resolve_bundle
from ..bundle.manifest import Manifest
from ..bundle.reader import Bundle, Verify, open_bundle
from ..checkpoint.family import Checkpoint
from ..checkpoint.hub import resolve_checkpoint
from ..description import RUNTIME_SETTINGS
from ..errors import CheckError, InputError, MissingRequirementError
from ..recipe import Tolerances, load_recipe
from ..runtime.choose import BackendName
from ..runtime.cpu.products import Products, check_products
from ..weight_formats import WeightFormats
from .engines import check_engines
from .gates import limits_for
from .identity import check_identity
from .numeric import Tell, check_numbers
from .quantisation import RoundedWeights, is_rounded
from .result import CheckReport, IdentityCheck, WeightsCheck
from .sources import BundleWeights, CheckpointWeights, WeightSource
from .verdict import judged, where_it_ends
from .weights import check_weights_and_digest

_VERSIONS = ("dmoe-export", "polygraphy", "torch", "onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt",
             "tensorrt-rtx-cu13-libs", "numpy")


def check_bundle(folder: str | Path, reference: str | Path | None = None, *, backends: Sequence[BackendName] = (),
                 cpu_products: Products = "exact",
                 layers: int | None = None, atol: float | None = None, cosine: float | None = None,
                 recipe: str | Path | None = None, prompts: Sequence[str] = (), seed: int = 0, weights: bool = True,
                 verify: Verify = "full", expect_sha256: str | None = None, trusted_key: str | Path | None = None,
                 announce: Callable[[IdentityCheck], None] | None = None, tell: Tell | None = None) -> CheckReport:
    """Check a bundle against the eager float32 model of a checkpoint (each a folder or hub id), or of its own weights.

    `backends`: none = ONNX Runtime on the CPU and the best of this machine. `cpu_products`: as in `Generator.open`;
    with fast ones, layers alone run exactly and what is in sequence is held to bfloat16's limits. `layers`: compare
    the first N layers only, in little memory; nothing is decoded. `atol`, `cosine` replace limits of `gates.LIMITS`,
    and a `recipe` those of layers alone. `verify`, `expect_sha256`, `trusted_key`: as in `open_bundle`. `weights`:
    also compare all bytes with the checkpoint. `announce` is told the identity before anything is computed.
    Raises InputError for what cannot be read, MissingRequirementError for a machine that cannot run it, CheckError when
    the checkpoint's sizes are not the bundle's.
    """
    start, tell = time.perf_counter(), tell or (lambda phase, done, of: None)
    products = check_products(cpu_products)
    bundle = open_bundle(resolve_bundle(folder), verify, expect_sha256=expect_sha256, trusted_key=trusted_key)
    manifest = bundle.manifest
    _check_options(manifest, layers, atol, cosine)
    tolerances = None if recipe is None else _tolerances(recipe, bundle)
    kept = bundle.manifest.model.num_layers if layers is None else layers
    checkpoint = None if reference is None else Checkpoint(resolve_checkpoint(reference), kept)
    try:
        weights_check, identity = _stored(bundle, checkpoint, layers, weights, tell)
        if announce:
            announce(identity)
        source = _source(bundle, checkpoint, kept, identity)
        if layers is None:
            _check_memory(bundle)
        limits = limits_for(manifest.precision, cosine, atol, tolerances, fast=products == "fast")
        numeric = check_numbers(bundle, source, backends, limits, cut=layers is not None, products=products,
                                prompts=list(prompts), seed=seed, tell=tell)
    finally:
        if checkpoint:
            checkpoint.reader.close()
    tell("engines", 0, 1)
    engines = check_engines(bundle)
    bad, passed, verdict = judged(identity, weights_check, numeric, engines, manifest.precision)
    return CheckReport(
        bundle=str(folder), reference=str(reference) if checkpoint else "the bundle's own weights" + (
            f" ({manifest.precision_in_words}, as stored)" if manifest.formats.group_size else ""),
        reference_kind="checkpoint" if checkpoint else "bundle weights", family=manifest.model.family,
        precision=manifest.precision, stored=manifest.precision_in_words,
        routing=_routing(manifest), block_length=manifest.routing.block_length,
        layers_checked=kept, layers_total=manifest.model.num_layers, experts_exercised=numeric.experts_exercised,
        num_experts=manifest.model.moe.num_experts if manifest.model.moe else 0, inputs=numeric.inputs,
        identity=identity, weights=weights_check, backends=numeric.backends, engines=engines, first_bad_layer=bad,
        passed=passed, verdict=verdict, created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        machine=f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs", versions=_versions(),
        quantisation=numeric.quantisation, reference_not_finite=where_it_ends(numeric),
        seconds=time.perf_counter() - start)


def _check_options(manifest: Manifest, layers: int | None, atol: float | None, cosine: float | None) -> None:
    d = manifest.model
    low = d.moe.first_dense_layers + 1 if d.moe else 1
    if layers is not None and not low <= layers <= d.num_layers:
        raise InputError(f"--layers {layers} is not between {low}{' (the first layer with experts)' if d.moe else ''} "
                         f"and {d.num_layers}.")
    if cosine is not None and not -1 <= cosine <= 1:
        raise InputError(f"--cosine {cosine} is outside -1 … 1.")
    if atol is not None and not atol >= 0:
        raise InputError(f"--atol {atol} is not 0 or more.")


def _tolerances(recipe: str | Path, bundle: Bundle) -> Tolerances:
    """A recipe's limits; they are for its own precision."""
    found, precision = load_recipe(recipe), bundle.manifest.export_precision
    if found.precision != precision:
        raise InputError(f"The limits of recipe {found.name} are for {found.precision} and {bundle.folder} is "
                         f"{precision}; leave --recipe out.")
    return found.check


def _stored(bundle: Bundle, checkpoint: Checkpoint | None, layers: int | None, compare: bool,
            tell: Tell) -> tuple[WeightsCheck, IdentityCheck]:
    """Bytes and identity; one reading of the checkpoint does for both."""
    if checkpoint is None:
        note = "Not compared: no --reference was given."
        return _no_weights(note), IdentityCheck(same=None, bundle=bundle.manifest.checkpoint.identity, reference=None,
                                                note=note)
    if not compare:
        return _no_weights("Not compared: --no-weights."), check_identity(bundle, checkpoint, layers)
    result, digests = check_weights_and_digest(bundle, checkpoint, layers,
                                               lambda done, of: tell("weights", done, of))
    return result, check_identity(bundle, checkpoint, layers, digests)


def _no_weights(note: str) -> WeightsCheck:
    return WeightsCheck(compared=False, note=note, tensors=0, experts=0, bytes=0, different=[], first_bad_layer=None,
                        passed=True)


def _source(bundle: Bundle, checkpoint: Checkpoint | None, layers: int, identity: IdentityCheck) -> WeightSource:
    """The reference's weights; a checkpoint of other sizes cannot be compared at all."""
    d = bundle.manifest.model.model_copy(update={"num_layers": layers})
    if checkpoint is None:
        return BundleWeights(bundle, d)
    theirs = checkpoint.description
    sizes = ("vocab_size", "hidden_size", "num_layers", "num_kv_heads", "head_dim", "moe_layers")
    if any(getattr(d, name) != getattr(theirs, name) for name in sizes) or (
            d.moe and theirs.moe and (d.moe.num_experts, d.moe.experts_per_token) != (
                theirs.moe.num_experts, theirs.moe.experts_per_token)):
        raise CheckError(identity.note)
    source = CheckpointWeights(checkpoint)
    return RoundedWeights(source, bundle.manifest) if is_rounded(bundle.manifest, checkpoint) else source


def _check_memory(bundle: Bundle) -> None:
    """The reference decodes with all weights in float32; say so before the machine swaps."""
    model, entry = bundle.manifest.model, bundle.manifest.experts
    needed = sum(part_bytes(model, WeightFormats.all_as("fp32", model.moe is not None), "fp32").values())
    if entry:
        needed += 4 * 3 * model.experts.num_experts * model.hidden_size * entry.stored_width * len(entry.layers)
    try:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return
    if needed > free:
        raise MissingRequirementError(
            f"The float32 reference of {bundle.folder} takes {needed / 1e9:.0f} GB, this machine has {free / 1e9:.0f} "
            "GB of memory; check the first layers with: --layers 2.")


def _routing(manifest: Manifest) -> str:
    if manifest.model.moe is None:
        return "none"
    mode = manifest.routing.mode
    settings = (f"{name} {getattr(manifest.routing, name)}" for name in RUNTIME_SETTINGS[mode])
    return ", ".join((mode, *settings)) if mode != "top_p" else ", ".join(settings)


def _versions() -> dict[str, str]:
    found = {}
    for name in _VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"python": platform.python_version(), **found}
