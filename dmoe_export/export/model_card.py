"""The card of a new bundle: what it is, where it comes from, how it was made, how it is run (bundle/card.py)."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

from ..bundle.card import cell, files_table, section
from ..bundle.manifest import DecodeValues, Manifest
from ..decoding.settings import OPTIONS
from ..description import RUNTIME_SETTINGS
from ..hub import hub_id
from .licence import Licence

LIBRARY = "dmoe-export"
NOT_CHECKED = "Not run. `dmoe-export check BUNDLE --reference CHECKPOINT` writes its result here."
_SNAPSHOT = re.compile(r"models--(.+?)--(.+)")


def source_name(checkpoint: str | Path) -> str:
    """What a checkpoint is called in public: its hub id, or the folder's name, never a path of this machine."""
    name = hub_id(checkpoint)
    if name:
        return name
    folder = Path(checkpoint).absolute()
    cached = _SNAPSHOT.fullmatch(folder.parent.parent.name) if folder.parent.name == "snapshots" else None
    return f"{cached[1]}/{cached[2]}" if cached else folder.resolve().name or "checkpoint"


def without_path(sentence: str, folder: Path, name: str) -> str:
    """A sentence with a checkpoint's public name for its path: a bundle may be published. Only whole paths count."""
    return re.sub(rf"(?<![\w./-]){re.escape(str(folder))}(?=[/,;:\s)]|\.?$|\.\s)", lambda _: name, sentence)


def model_card(manifest: Manifest, licence: Licence) -> str:
    """README.md of a bundle, in the form that hubs read."""
    d, source = manifest.model, manifest.checkpoint.source
    public = source if "/" in source else None  # no folder's name
    head: dict[str, str | list[str]] = {
        **licence.fields, "library_name": LIBRARY, "pipeline_tag": "text-generation",
        # The hub's word for the same model in another form.
        **({"base_model": public, "base_model_relation": "quantized"} if public else {}),
        "tags": [LIBRARY, "onnx", "diffusion-language-model", d.family]}
    experts = (f"{d.moe.num_experts} experts, {d.moe.experts_per_token} per token" if d.moe else "dense")
    kept = ("" if d.num_layers == manifest.checkpoint.layers_total
            else f" (the first of {manifest.checkpoint.layers_total}: for tests, no whole model)")
    rows = {
        "model": f"{d.family} ({d.architecture}), {d.num_layers} layers{kept}, hidden size {d.hidden_size}, {experts}",
        "checkpoint": source,
        "checkpoint's identity": manifest.checkpoint.identity,
        "licence": licence.in_words,
        "precision": manifest.precision_in_words,
        "routing": _routing(manifest),
        "block length": f"{manifest.step_tokens}, a canvas" if d.canvas else str(manifest.step_tokens),
        "decode defaults": _listed(manifest.decode_defaults) or "the program's",
        **{f"preset {name}": _listed(values) for name, values in manifest.presets.items()},
        "tokenizer": _text_side(manifest),
        "made by": manifest.created_by}
    table = "".join(f"| {name} | {cell(value)} |\n" for name, value in rows.items())
    warnings = "".join(f"* {cell(warning)}\n" for warning in manifest.warnings)
    return (f"---\n{_yaml(head)}---\n\n# {cell(source.rpartition('/')[2])} for dmoe-export\n\n"
            f"{cell(source)} as a bundle of dmoe-export: an ONNX graph of its denoiser, weights beside it, and what a "
            "program needs to know to decode with them.\n\n"
            f"| | |\n|---|---|\n{table}\n"
            + (f"## Warnings of the export\n{warnings}\n" if warnings else "")
            + f"## Run\n```\n{_run(manifest)}\n```\n\n## Make it again\n```\n{export_command(manifest)}\n```\n"
            f"{_of_recipe(manifest)}\n"
            f"## Check\n{section('check', NOT_CHECKED)}\n## Files\n{section('files', files_table(manifest))}")


def _of_recipe(manifest: Manifest) -> str:
    """A line where the command alone would not give the bundle its presets and decode defaults."""
    options = [OPTIONS[name] for name in manifest.decode_defaults]
    asked = manifest.presets or not all(one.told.of_bundle for one in options)  # of no generation_config.json
    return "With `--recipe`: decode defaults and presets are those of a recipe.\n" if asked else ""


def _listed(values: DecodeValues) -> str:
    """Settings in words; empty for none."""
    return ", ".join(f"{name} {value}" for name, value in values.items())


def export_command(manifest: Manifest) -> str:
    """The command that makes this bundle, defaults spelled out."""
    routing, formats, moe = manifest.routing, manifest.formats, manifest.model.moe
    words = ["dmoe-export", "export", manifest.checkpoint.source, "--out", "BUNDLE",
             "--precision", manifest.export_precision, "--compute", manifest.precision]
    if len(set(formats.parts.values())) > 1:
        words += ["--dense-precision", formats.dense, "--head-precision", formats.head,
                  "--embedding-precision", formats.embedding]
    if formats.group_size:
        words += ["--group-size", str(formats.group_size)]
    words += ["--block-length", str(routing.block_length)]
    if moe:
        asked = not routing.reason or routing.reason.startswith("asked for")
        words += ["--routing", routing.mode if asked else "auto"]
        options = {"top_p": "--coreset-top-p", "min_experts": "--min-experts", "coreset_size": "--coreset-size"}
        for name in RUNTIME_SETTINGS[routing.mode]:
            words += [options[name], str(getattr(routing, name))]
    if manifest.model.num_layers != manifest.checkpoint.layers_total:
        words += ["--layers", str(manifest.model.num_layers)]
    if manifest.salient:
        words.append("--salient")
        for entry in manifest.salient.fixed:
            words += ["--salient-capacity", str(entry.capacity)]
    return shlex.join(words)


def _routing(manifest: Manifest) -> str:
    if manifest.model.moe is None:
        return "none: no experts" + (f" ({manifest.routing.reason})" if manifest.routing.reason else "")
    routing = manifest.routing
    settings = "".join(f", {name} {getattr(routing, name)}" for name in RUNTIME_SETTINGS[routing.mode])
    return f"{routing.mode}{settings}" + (f" ({routing.reason})" if routing.reason else "")


def _text_side(manifest: Manifest) -> str:
    if manifest.tokenizer is None:
        return "none: takes token ids"
    return f"{manifest.tokenizer.file}, {'with a' if manifest.tokenizer.chat_template else 'no'} chat template"


def _run(manifest: Manifest) -> str:
    extra = "gpu" if manifest.precision == "bf16" else "cpu"  # ONNX Runtime has no bf16 kernels for CPUs
    prompt = "--prompt 'what is 2 plus 3?'" if manifest.tokenizer else "--prompt-ids 5,6,7"
    return f"pip install '.[{extra}]'  # in a checkout of dmoe-export\ndmoe-export generate BUNDLE {prompt}"


def _yaml(fields: dict[str, str | list[str]]) -> str:
    """Front matter; a text in quotes as JSON has it is one in YAML, too."""
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in fields.items()]
    return "\n".join(lines) + "\n"
