"""`dmoe-export deploy triton`: a model repository for Triton Inference Server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ..bundle.hub import resolve_bundle
from ..bundle.reader import open_bundle
from ..deploy.triton import Kind, check_model_name, model_config, write_model
from ..errors import RequestError
from ..runtime.residency.budget import plan_budget
from ..serving.names import name_of
from .deploy import words_of
from .help import SETTINGS, Verb, option
from .opening import MEMORY, opening_of, opening_options
from .options import JSON
from .output import say

_ON_GPUS = ("tensorrt", "onnxruntime-cuda")


@click.command(cls=Verb, context_settings=SETTINGS, examples=(
    "dmoe-export deploy triton sample.bundle --out repository --threads 2",
    "dmoe-export deploy triton sample.bundle --out repository --name small --max-batch 4 --json"))
@click.argument("bundle", type=click.Path(path_type=Path))
@option("--out", required=True, type=click.Path(path_type=Path), metavar="REPOSITORY", group="output",
        help="Folder of the model repository, which may hold other models; needed")
@option("--force", is_flag=True, group="output", help="Write the files of an existing model anew")
@JSON
@option("--name", metavar="NAME", group="model", shown="its folder's name without .bundle",
        help="What clients call the bundle")
@option("--kind", type=click.Choice(["cpu", "gpu"]), default="cpu", group="model",
        help="Where instances run; with gpu, each GPU of the server has some")
@option("--instances", type=click.IntRange(1, 64), default=1, group="model",
        help="Processes that hold the bundle, on the CPU or on each GPU")
@option("--bundle-path", metavar="PATH", group="model", shown="where it is here",
        help="Where the bundle is on the server, such as a folder of a container")
@option("--max-batch", type=click.IntRange(1, 1024), group="requests", shown="the engine's, or 8",
        help="Most answers of an instance that are decoded at once")
@option("--prefix-cache", metavar="SIZE", group="requests", shown="none is kept",
        help="Memory of an instance, such as 512M, for prompts that begin alike: their first blocks are computed once")
@option("--max-waiting", type=click.IntRange(0), default=64, group="requests",
        help="Most requests of an instance beyond --max-batch; more are refused")
@option("--max-new-tokens", type=click.IntRange(1), default=4096, group="requests",
        help="Most tokens that an answer may ask for")
@option("--timeout", type=click.FloatRange(0.1), default=600.0, group="requests",
        help="Most seconds of a request, waiting included")
@option("--drain-seconds", type=click.FloatRange(0), default=30.0, group="requests",
        help="Seconds that requests have to end once the model is unloaded")
@opening_options
@MEMORY
@click.pass_context
def triton(context: click.Context, bundle: Path, out: Path, force: bool, as_json: bool, name: str | None, kind: Kind,
           instances: int, bundle_path: str | None, **options: Any) -> None:
    """Write a model of Triton Inference Server that runs BUNDLE, a folder or a hub id.

    What is written is NAME/config.pbtxt, which names the bundle and the options, and NAME/1/model.py, which imports
    this package; the bundle stays where it is.
    """
    opening = opening_of(options)
    if kind == "cpu" and opening["backend"] in _ON_GPUS:
        raise RequestError(f"Backend {opening['backend']} runs on GPUs; add --kind gpu.")
    if kind == "gpu" and opening["backend"] == "onnxruntime":
        raise RequestError("Backend onnxruntime runs on the CPU; leave --kind gpu out, or choose another --backend.")
    folder = resolve_bundle(bundle)
    opened = open_bundle(folder, "sizes")
    plan_budget(opened.manifest, opening["expert_budget"], opening["experts_per_layer"])
    called = name or name_of(bundle)
    check_model_name(called)
    if opening["trusted_key"] is not None:
        opening["trusted_key"] = opening["trusted_key"].resolve()
    parameters = {"bundle": bundle_path or folder.resolve(), **_given(context, opening | options)}
    made = write_model(out, called, model_config(called, parameters, kind, instances, words_of(context)), force)
    if as_json:
        click.echo(json.dumps({"model": called, "folder": str(made), "parameters": {
            one: str(value) for one, value in parameters.items()}}))
        return
    say(f"Wrote model {called}: {made}; start it with: tritonserver --model-repository {out.resolve()}")


def _given(context: click.Context, values: dict[str, Any]) -> dict[str, Any]:
    """What was not left to its default."""
    return {name: value for name, value in values.items()
            if context.get_parameter_source(name) is not ParameterSource.DEFAULT}
