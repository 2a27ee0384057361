"""`dmoe-export deploy kubernetes`: manifests for replicas of `dmoe-export serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .. import __version__
from ..bundle.hub import resolve_bundle
from ..bundle.manifest import Manifest
from ..bundle.reader import open_bundle
from ..decoding.prefixes import check_keeps
from ..deploy.kubernetes import BUNDLES, Servers, manifests, pod_memory
from ..deploy.kubernetes_names import check_name, name_of
from ..deploy.yaml_text import save_text, write_yaml
from ..errors import RequestError
from ..fit.predict import predict
from ..fit.prediction import Named, Prediction
from ..serving.schema import MOST_NAME
from ..text.messages import short
from ..words import count, listed, size
from .deploy import words_of
from .help import SETTINGS, Verb, option
from .output import say

_SLOTS = 8  # answers at once, as `serve` without an engine
_NO_MACHINE = 1 << 62  # bytes: budgets are held against no machine, as this one is not the pods'


@click.command(cls=Verb, context_settings=SETTINGS, examples=(
    "dmoe-export deploy kubernetes sample.bundle --out kubernetes.yaml",
    "dmoe-export deploy kubernetes sample.bundle --replicas 2 --max-replicas 6 --key-secret dmoe-keys"))
@click.argument("bundle", type=click.Path(path_type=Path))
@option("--name", metavar="NAME", group="objects", shown="made of the bundle's name",
        help="Name of every object, so also of the Service that clients call")
@option("--namespace", metavar="NAME", group="objects", shown="that of kubectl's context",
        help="Namespace of the objects")
@option("--replicas", type=click.IntRange(1, 1000), default=1, group="objects", help="Servers at once, or the least")
@option("--max-replicas", type=click.IntRange(1, 1000), group="objects", shown="--replicas stay",
        help="Most servers, for an autoscaler: by processor time, or with --gpus by requests in progress")
@option("--image", metavar="IMAGE", group="container", shown=f"dmoe-export:{__version__}",
        help="Image with dmoe-export in it")
@option("--claim", metavar="NAME", group="container", shown="--name",
        help="PersistentVolumeClaim of the volume that holds the bundle")
@option("--in-image", is_flag=True, group="container",
        help="The bundle is in the image, below /bundles, not in a volume")
@option("--folder", metavar="PATH", group="container", shown="the bundle's name",
        help="Folder of the bundle in the volume, or below /bundles of the image")
@option("--cpus", type=click.IntRange(1, 1024), default=2, group="container",
        help="Processors of a pod, and without --gpus threads of the server")
@option("--gpus", type=click.IntRange(0, 1), default=0, group="container",
        help="GPUs of a pod; a server uses one")
@option("--expect-sha256", metavar="HEX", group="container", shown="any",
        help="Servers start only with the bundle whose manifest has this sha256; BUNDLE must have it, too")
@option("--model", metavar="NAME", group="server", shown="its folder's name without .bundle",
        help="What clients call the bundle")
@option("--key-secret", metavar="NAME", group="server", shown="no key is asked for",
        help="Secret whose entry 'keys' is a file with an API key per line")
@option("--allowed-host", "hosts", multiple=True, metavar="NAME", group="server", shown="the Service's names",
        help="Further name by which clients without a key may call the server; may be given again")
@option("--max-batch", type=click.IntRange(1, 1024), group="server", shown="the engine's, or 8",
        help="Most answers that a server decodes at once")
@option("--max-context", type=click.IntRange(1), group="server", shown="the model's, or the engine's",
        help="Tokens of prompt and answer that each of them is given memory for")
@option("--prefix-cache", metavar="SIZE", group="server", shown="none is kept",
        help="Memory of a server, such as 512M, for prompts that begin alike")
@option("--expert-budget", metavar="SIZE", group="server", shown="all",
        help="Memory for experts, such as 4G, 25% or bytes; the others wait on the volume")
@option("--timeout", type=click.IntRange(1, 86400), default=600, group="server",
        help="Most seconds of a request, and those that requests have to end when a server is to stop")
@option("--out", type=click.Path(path_type=Path), metavar="FILE", group="output", shown="standard output",
        help="Write the manifests here")
@option("--force", is_flag=True, group="output", help="Replace FILE")
@click.pass_context
def kubernetes(context: click.Context, bundle: Path, out: Path | None, force: bool, **asked: Any) -> None:
    """Write a Deployment of servers of BUNDLE, a folder or a hub id, with its Service and what belongs to them.

    Probes, draining, rolling updates without a gap, memory as predicted, no rights that it does not need.
    """
    folder = resolve_bundle(bundle)
    sealed = asked["expect_sha256"]
    manifest = open_bundle(folder, "full" if sealed else "sizes", expect_sha256=sealed).manifest
    servers, sentence = _servers(bundle if bundle.name.strip(".") else bundle.resolve(), manifest, asked)
    made = manifests(servers)
    text = write_yaml(made, "\n".join([f"Made by: {words_of(context)}", *_notes(servers, sentence)]))
    if out is None:
        click.echo(text, nl=False)
        return
    save_text(text, out, force)
    kinds = listed([document["kind"] for document in made])
    say(f"{out}: {kinds}; its first lines say what the cluster must have.", err=True)


def _servers(bundle: Path, manifest: Manifest, asked: dict[str, Any]) -> tuple[Servers, str]:
    """All that was asked for, checked; and how its memory comes about."""
    name = check_name("--name", asked["name"], "service") if asked["name"] else name_of(bundle)
    folder = check_name("--folder", asked["folder"] or bundle.name, "folder")
    model = asked["model"] or folder.rpartition("/")[2].removesuffix(".bundle")
    if not 0 < len(model) <= MOST_NAME or not model.isprintable():
        raise RequestError(f"Model name {short(model)} must have 1 to {MOST_NAME} characters; choose one with "
                           "--model.")
    if asked["in_image"] and asked["claim"]:
        raise RequestError(f"--claim {short(asked['claim'])} and --in-image are two places for one bundle; give one.")
    if asked["max_replicas"] and asked["max_replicas"] < asked["replicas"]:
        raise RequestError(f"--max-replicas {asked['max_replicas']} is less than --replicas {asked['replicas']}; give "
                           "more, or leave it out.")
    if asked["prefix_cache"]:
        check_keeps(manifest.model)
    if "%" in (asked["prefix_cache"] or ""):
        raise RequestError(f"--prefix-cache {asked['prefix_cache']} is a share of a node's memory, which is not known "
                           "here; give a size, such as 512M.")
    backend = _backend(manifest, asked["gpus"], asked["expert_budget"])
    rows, context = _rows(manifest, backend, asked["max_batch"]), _context(manifest, backend, asked["max_context"])
    sizes = {word: asked[word] for word in ("expert_budget", "prefix_cache") if asked[word]}
    predicted = predict(manifest, backend=backend, max_batch=rows, max_context=context, program="serve", kernels=True,
                        threads=None if asked["gpus"] else asked["cpus"], machine_bytes=_NO_MACHINE, **sizes)
    sealed = {"expect_sha256": asked["expect_sha256"]} if asked["expect_sha256"] else {}
    more = [f"--{word.replace('_', '-')}={value}" for word, value in (sizes | sealed).items()]
    servers = Servers(
        name, model, folder, check_name("--image", asked["image"] or f"dmoe-export:{__version__}", "image"), backend,
        pod_memory(predicted.host_bytes), sum(entry.size for entry in manifest.files), rows,
        namespace=asked["namespace"] and check_name("--namespace", asked["namespace"], "label"),
        claim=None if asked["in_image"] else check_name("--claim", asked["claim"] or name, "object"),
        key_secret=asked["key_secret"] and check_name("--key-secret", asked["key_secret"], "object"),
        hosts=tuple(check_name("--allowed-host", host, "host") for host in asked["hosts"]),
        more=tuple(more), **{word: asked[word] for word in ("replicas", "max_replicas", "cpus", "gpus", "timeout")})
    return servers, _told(predicted)


def _told(predicted: Prediction) -> str:
    known = predicted.compared if predicted.compared.startswith("never") else f"compared with {predicted.compared}"
    return (f"{size(predicted.host_bytes)} predicted for {count(predicted.max_batch, 'answer')} of "
            f"{count(predicted.max_context, 'token')}, prompts included, and a fifth more. Such predictions were "
            f"{known}.")


def _backend(manifest: Manifest, gpus: int, expert_budget: str | None) -> Named:
    """By name: with `auto`, a pod whose GPU cannot be used would run on the processor."""
    if not gpus:
        return "onnxruntime"
    if expert_budget and not any(engine.expert_pools for engine in manifest.denoiser_engines):
        raise RequestError(f"--expert-budget {expert_budget} with --gpus needs an engine with expert pools; make one "
                           "with: dmoe-export build BUNDLE --experts resident.")
    return "tensorrt" if manifest.denoiser_engines else "onnxruntime-cuda"


def _rows(manifest: Manifest, backend: str, asked: int | None) -> int:
    """Answers at once, at most what every engine of the bundle takes."""
    engines = manifest.denoiser_engines if backend == "tensorrt" else []
    most = min((engine.profiles[0].batch[2] for engine in engines), default=0)
    if most and asked and asked > most:
        raise RequestError(f"--max-batch {asked} is more than the {most} rows of the bundle's engine; give less, or "
                           "build another engine.")
    return asked or most or _SLOTS


def _context(manifest: Manifest, backend: str, asked: int | None) -> int:
    """Tokens of one answer and its prompt, at most what the model and every engine take."""
    engines = manifest.denoiser_engines if backend == "tensorrt" else []
    most = min([manifest.model.max_positions, *(engine.profiles[1].past[2] for engine in engines)])
    if asked and asked > most:
        raise RequestError(f"--max-context {asked} is more than the {most} tokens that this bundle takes; give less, "
                           "or leave it out.")
    return asked or most


def _notes(servers: Servers, memory: str) -> list[str]:
    """What the cluster must have, and where the memory comes from: comments at the head of the file."""
    needs = [f"image {servers.image}" + ("" if servers.claim else f" with the bundle as {BUNDLES}/{servers.folder}")]
    if servers.claim:
        needs.append(f"PersistentVolumeClaim {servers.claim} with the bundle as {servers.folder}")
    if servers.key_secret:
        needs.append(f"Secret {servers.key_secret} with an entry keys, a key per line")
    return [f"Needs {listed(needs)}.", *(
                [] if servers.key_secret else ["No key is asked for: whoever reaches the Service may use it."]),
            f"Memory of a pod: {memory}",
            "What every part is for: docs/kubernetes.md of dmoe-export."]
