"""The bundle a benchmark runs on: a given one, or one of a published geometry with generated weights, made once."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle.reader import Bundle, open_bundle, read_manifest
from ..bundle.writer import BundleWriter, write_manifest
from ..description import ModelDescription, Precision, RoutingChoice
from ..errors import BundleError, MissingRequirementError
from ..extras import pip_install

Report = Callable[[str, int, int], None]
_SOURCES = ("export", "model", "ops", "checkpoint")
_MADE_BY = "made-by.txt"


def generated_bundle(work: Path, geometry: str, *, layers: int | None, precision: str, routing: str | None, seed: int,
                     block_length: int | None = None, compute: Precision = "fp32",
                     report: Report | None = None) -> Bundle:
    """The bundle of a geometry in folder `work`; a finished one from before is used again.

    `routing` None: `measured_routing`.
    Was it made by other sources of this package, then its graph is traced anew over its data files.
    Raises RequestError for an unknown geometry, MissingRequirementError without the exporter's libraries.
    """
    try:
        from ..checkpoint.generated import GeneratedCheckpoint
        from ..export.exporter import export_checkpoint
    except ImportError as error:
        raise MissingRequirementError(f"--geometry needs the exporter ({error}); install it with: "
                                      f"{pip_install('export')}, or give a bundle.") from None
    name = "-".join(str(part) for part in (geometry, layers or "all", precision, compute, routing or "default",
                                           block_length or "default", seed))
    folder, made_by = work / f"{name}.bundle", sources_digest()
    try:
        read_manifest(folder)
    except BundleError:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        if (folder / _MADE_BY).read_text(encoding="utf-8") == made_by or _retraced(folder):
            (folder / _MADE_BY).write_text(made_by, encoding="utf-8")
            return open_bundle(folder, "sizes")
        shutil.rmtree(folder)
    source = GeneratedCheckpoint(geometry, layers, seed)
    options: dict[str, Any] = {"precision": precision, "compute": compute, "block_length": block_length,
                               "report": report,
                               "routing": routing or measured_routing(source.description)}
    export_checkpoint(source, folder, **options)
    (folder / _MADE_BY).write_text(made_by, encoding="utf-8")
    return open_bundle(folder, "sizes")


def random_prompt(bundle: Bundle, tokens: int, seed: int) -> list[int]:
    """Token ids of no special token."""
    d = bundle.manifest.model
    ids = np.random.default_rng(seed).integers(0, d.vocab_size, tokens)
    ids[np.isin(ids, [d.barred_id, *d.eos_ids, d.pad_id])] = 0
    return ids.tolist()


def measured_routing(description: ModelDescription) -> RoutingChoice:
    """`top_p` for block diffusion with experts, whatever such a model was trained with: what it costs is the question,
    and generated weights have no accuracy to lose. Else as the export chooses."""
    return "top_p" if description.moe and description.attention == "block_causal" else "auto"


def sources_digest() -> str:
    """sha256 over the sources that decide what a bundle is."""
    digest, package = hashlib.sha256(), Path(__file__).parents[1]
    for part in _SOURCES:
        for path in sorted((package / part).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _retraced(folder: Path) -> bool:
    """Put a graph of today's exporter over the data files; False when its weights are not those in the files."""
    import onnx_ir as ir

    from ..export.graph_file import save_graph
    from ..export.trace import trace_denoiser

    manifest = read_manifest(folder)
    if manifest.salient or manifest.engines:
        return False
    width = manifest.experts.stored_width if manifest.experts else 0
    old = ir.load(folder / manifest.denoiser.file).graph.initializers
    model = trace_denoiser(manifest.model, manifest.routing, manifest.precision, manifest.formats, width)
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            continue
        stored = old[name].const_value if name in old else None
        if not isinstance(stored, ir.ExternalTensor) or (stored.shape, stored.dtype) != (value.shape, value.dtype):
            return False
        value.const_value = stored
    writer = BundleWriter(folder)  # not entered: it writes into the finished folder
    writer.entries += [entry for entry in manifest.files if entry.path != manifest.denoiser.file]
    graph = save_graph(model, writer, manifest.denoiser.file)
    write_manifest(folder, manifest.model_copy(update={"files": writer.entries, "denoiser": graph}))
    return True
