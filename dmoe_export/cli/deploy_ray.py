"""`dmoe-export deploy ray`: Ray Serve's configuration file for bundles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_args

import click
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from ..bundle.reader import read_manifest
from ..deploy.ray import serve_config
from ..deploy.yaml_text import save_text, write_yaml
from ..errors import RequestError
from ..serving.names import check_one_hash, names_of
from ..serving.ray.settings import OF_OPENING, Settings
from .help import SETTINGS, Verb, option
from .opening import opening_of, opening_options
from .output import say

F = TypeVar("F", bound=Callable[..., Any])
_OWN = ("bundle", "name", *OF_OPENING)  # those of the verb's own, and those that `serve` has, too


def _settings_options(command: F) -> F:
    """An option for each field of `Settings` that no other verb has told."""
    for name, field in reversed(Settings.model_fields.items()):
        if name not in _OWN:
            command = _option(name, field)(command)
    return command


def _option(name: str, field: FieldInfo) -> Callable[[F], F]:
    words: dict[str, Any] = field.json_schema_extra  # type: ignore[assignment]
    flag, kinds = "--" + name.replace("_", "-"), _kinds(field.annotation)
    told = {"group": words["group"], "help": str(field.description), "shown": words["shown"]}
    if tuple in kinds:
        return option(flag.removesuffix("s"), name, multiple=True, metavar="NAME", **told)
    if bool in kinds:
        return option(flag, name, is_flag=True, **told)
    default = field.default
    if str in kinds:
        return option(flag, name, default=default, metavar="FILE" if name.endswith("_file") else "SIZE", **told)
    least, most = (next((getattr(one, word) for one in field.metadata if hasattr(one, word)), None)
                   for word in ("ge", "le"))
    kind = click.IntRange(least, most) if int in kinds else click.FloatRange(least, most)
    return option(flag, name, type=kind, default=default, **told)


def _kinds(annotation: Any) -> set[Any]:
    """The classes in it."""
    parts = get_args(annotation)
    found = {annotation, getattr(annotation, "__origin__", None)} if isinstance(annotation, type) or parts else set()
    return found.union(*map(_kinds, parts))


@click.command(cls=Verb, context_settings=SETTINGS, examples=(
    "dmoe-export deploy ray sample.bundle --out serve.yaml --replicas 2",
    "dmoe-export deploy ray sample.bundle --max-replicas 4 --downscale-delay 120"))
@click.argument("bundles", metavar="BUNDLE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@option("--out", type=click.Path(path_type=Path), metavar="FILE", group="output", shown="standard output",
        help="Write the file here")
@option("--force", is_flag=True, group="output", help="Replace the file")
@option("--name", "names", multiple=True, metavar="NAME", group="model", shown="its folder's name without .bundle",
        help="What clients call a bundle; may be given again, once per bundle in their order")
@option("--host", default="127.0.0.1", metavar="ADDRESS", group="network", help="Address that Serve listens on")
@option("--port", type=click.IntRange(1, 65535), default=8000, group="network", help="Port that Serve listens on")
@_settings_options
@opening_options
def ray(bundles: tuple[Path, ...], out: Path | None, force: bool, names: tuple[str, ...], host: str, port: int,
        **options: Any) -> None:
    """Write what `serve run FILE` and `serve deploy FILE` of Ray Serve take: an application for each BUNDLE.

    One bundle answers below /, several below /NAME each, with the same options; edit the file to tell them apart.
    """
    opened = opening_of(options)
    called = names_of(bundles, names)
    check_one_hash(bundles, opened["expect_sha256"])
    asked = {name: value for name, value in (options | opened).items() if value != Settings.model_fields[name].default}
    applications = {}
    for bundle, name in zip(bundles, called, strict=True):
        arguments = {"bundle": _place(bundle), "name": name, **asked}
        _check(arguments)
        applications[name] = {key: list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path)
                              else value for key, value in arguments.items()}
    text = write_yaml([serve_config(applications, host, port)], "Ray Serve: serve run FILE, or serve deploy FILE.")
    if out is None:
        click.echo(text, nl=False)
    else:
        save_text(text, out, force)
        say(f"dmoe-export: {out}: serve run {out}", err=True)


for _one in ray.params:
    if _one.name == "threads" and isinstance(_one, click.Option):
        _one.help = str(_one.help).replace("ONNX Runtime's choice", "--cpus")


def _place(bundle: Path) -> str:
    """Where replicas find it: a bundle of this machine is looked at, another is theirs to find."""
    if not bundle.exists():
        say(f"dmoe-export: warning: {bundle} is not on this machine; replicas look for it on theirs.", err=True)
        return str(bundle)
    read_manifest(bundle)
    return str(bundle.resolve())


def _check(arguments: dict[str, Any]) -> None:
    try:
        Settings(**{key: str(value) if isinstance(value, Path) else value for key, value in arguments.items()})
    except ValidationError as error:
        first = error.errors()[0]
        said = str(first["msg"]).removeprefix("Value error, ")
        place = ".".join(map(str, first["loc"]))
        raise RequestError(f"Settings of {arguments['name']} contradict: {place}{': ' if place else ''}{said}.") \
            from None
