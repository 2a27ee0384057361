"""Options of the command line that several verbs have: those of a request, and of opening a bundle to generate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from ..bundle.reader import Verify
from ..decoding.option import OFF, Option
from ..decoding.settings import OPTIONS
from ..runtime.choose import BACKENDS
from ..runtime.cpu.products import PRODUCTS
from ..runtime.cpu.session import MOST_THREADS
from .help import GroupedOption, metavar, option

F = TypeVar("F", bound=Callable[..., Any])

# As told in the docstring of Generator.open (a test compares).
BACKEND = option(
    "--backend", type=click.Choice(BACKENDS), default="auto", group="bundle and machine",
    help="What runs the bundle; auto: an engine of the bundle that fits this machine (tensorrt), else ONNX Runtime on "
    "the GPU (onnxruntime-cuda), else on the CPU (onnxruntime)")
THREADS = option("--threads", type=click.IntRange(1, MOST_THREADS), group="bundle and machine",
                 help="Threads per operator on the CPU", values="between 1 and 8 per CPU",
                 shown="ONNX Runtime's choice")
CPU_PRODUCTS = option(
    "--cpu-products", type=click.Choice(PRODUCTS), default="exact", group="bundle and machine",
    help="What weights are multiplied with on the CPU: exact (float32) or fast (integers for int8 and int4, bfloat16 "
    "for bf16, where the processor has them; rounds activations)")
VERIFY = option(
    "--verify", type=click.Choice(get_args(Verify)), default="full", group="bundle and machine",
    help="What is compared with the manifest before use: full (sizes and hashes) or sizes")
_SEAL = (
    option("--expect-sha256", metavar="HEX", group="bundle and machine", shown="any",
           help="Use the bundle only if its manifest has this sha256, as export and inspect print it"),
    option("--trusted-key", type=click.Path(path_type=Path), metavar="FILE", group="bundle and machine", shown="any",
           help="Use the bundle only if manifest.json.sig is a signature by this Ed25519 public key in PEM"))
OUT = option("--out", type=click.Path(path_type=Path), metavar="FILE", group="output", help="Write the JSON here")
PLOT = option("--plot", type=click.Path(path_type=Path), metavar="FILE", group="output", help="Write a PNG plot here")
JSON = option("--json", "as_json", is_flag=True, group="output", help="Print one JSON object")

def seal_options(command: F) -> F:
    """`--expect-sha256` and `--trusted-key`, to be handed to `open_bundle` by these names."""
    for one in reversed(_SEAL):
        command = one(command)
    return command


def request_option(name: str) -> Callable[[F], F]:
    """An option of a request; None where it is not given, which means the bundle's default."""
    return told_option(OPTIONS[name])


def told_option(one: Option) -> Callable[[F], F]:
    """An option that is told at its field; None where it is not given."""
    flag, words, more = "--" + one.name.replace("_", "-"), one.help, dict[str, Any]()
    if bool in one.types:
        flag += flag.replace("--", "/--no-", 1)
    elif one.several:
        words += " May be given again."
        more = {"type": one.several, "metavar": "ID" if one.several is int else "TEXT", "multiple": True,
                "callback": lambda context, option, values: values or None}
    else:
        kind = next((kind for kind in (int, float, str) if kind in one.types), None)
        text = "NAME" if one.name == "preset" else "TEXT"
        more = {"type": kind or click.Choice(one.types), "metavar": text if kind is str else metavar(kind)}
    return click.option(flag, cls=GroupedOption, group=one.told.group, word=OFF if one.told.off else None,
                        default=None, help=words, **more)


def request_options(command: F) -> F:
    """All options of a request, but --preset, which belongs to opening a bundle, too."""
    for name in reversed(OPTIONS):
        if name != "preset":
            command = request_option(name)(command)
    return command
