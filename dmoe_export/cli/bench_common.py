"""What the verbs of `dmoe-export bench` share: which bundle, and where a result goes."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import click

from ..bench.workload import generated_bundle
from ..bundle.hub import resolve_bundle
from ..bundle.reader import Bundle, open_bundle
from ..errors import OutputError, RequestError
from .help import option
from .options import VERIFY, seal_options
from .output import reader_may_leave
from .progress import byte_bar

_QUIET = 0.05  # of the processor's time
F = TypeVar("F", bound=Callable[..., Any])
_OF_GEOMETRY = ("layers", "precision", "compute", "routing", "block_length", "work")
_SEAL = ("expect_sha256", "trusted_key")
_NAMES = ("bundle", "geometry", "verify", *_OF_GEOMETRY, *_SEAL)


def words(text: str) -> list[str]:
    """Of an option's value, which commas separate; each once."""
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def integers(option: str, text: str) -> list[int]:
    """The same as integers, none below 0; RequestError for anything else."""
    if not words(text) or not all(re.fullmatch("[0-9]{1,18}", word) for word in words(text)):
        raise RequestError(f"{option} is {text!r}; give integers separated by commas, such as 0,256.")
    return [int(word) for word in words(text)]


def computed_by(cpu_ops: bool) -> str:
    """For the first line of a table."""
    return "our CPU kernels" if cpu_ops else "ONNX Runtime"


def bundle_options(command: F) -> F:
    """BUNDLE or --geometry and what goes with them, and --seed; to be handed to `opened`."""
    for one in reversed((
            click.argument("bundle", type=click.Path(path_type=Path), required=False),
            option("--geometry", metavar="NAME", group="bundle",
                   help="Instead of BUNDLE: a published size with generated weights, such as llada2.0-mini"),
            option("--layers", type=click.IntRange(min=1), group="bundle", shown="all",
                   help="The first so many of the geometry"),
            option("--precision", type=click.Choice(["fp32", "fp16", "bf16", "int8", "int4"]), group="bundle",
                   shown="fp32", help="How the geometry's bundle stores weights"),
            option("--compute", type=click.Choice(["fp32", "fp16"]), group="bundle", shown="fp32",
                   help="Type of activations and caches of the geometry's bundle"),
            option("--routing", type=click.Choice(["auto", "token", "top_p", "top_c"]), group="bundle",
                   shown="top_p for block diffusion with experts, else auto", help="Of the geometry's bundle"),
            option("--block-length", type=click.IntRange(min=1), group="bundle", shown="32",
                   help="Tokens per block of the geometry's bundle"),
            option("--work", type=click.Path(path_type=Path), metavar="FOLDER", group="bundle",
                   shown="a temporary one", help="Folder that keeps the geometry's bundle for later runs"),
            VERIFY,
            seal_options,
            option("--seed", type=int, default=0, group="bundle", help="Of weights and inputs"))):
        command = one(command)
    return command


@contextmanager
def opened(options: dict[str, Any], quiet: bool) -> Iterator[Bundle]:
    """The bundle that `bundle_options` describe, which are taken out of `options`, all but the seed."""
    chosen = {name: options.pop(name) for name in _NAMES}
    if bool(chosen["bundle"]) == bool(chosen["geometry"]):
        raise RequestError("Give either a BUNDLE or --geometry.")
    if chosen["bundle"]:
        for name in _OF_GEOMETRY:
            if chosen[name] is not None:
                raise RequestError(f"--{name.replace('_', '-')} belongs to --geometry; leave it out with a bundle.")
        yield open_bundle(resolve_bundle(chosen["bundle"]), chosen["verify"], **{name: chosen[name] for name in _SEAL})
        return
    if any(chosen[name] is not None for name in _SEAL):
        raise RequestError("--expect-sha256 and --trusted-key belong to a BUNDLE; leave them out with --geometry.")
    with tempfile.TemporaryDirectory() as temporary, byte_bar("bundle", 0, shown=not quiet) as report:
        yield generated_bundle(chosen["work"] or Path(temporary), chosen["geometry"], layers=chosen["layers"],
                               precision=chosen["precision"] or "fp32", compute=chosen["compute"] or "fp32",
                               routing=chosen["routing"],
                               block_length=chosen["block_length"], seed=options["seed"], report=report)


def outcome(document: dict[str, Any], out: Path | None, as_json: bool, show: Callable[[], None],
            draw: Callable[[Path], None] | None = None, plot: Path | None = None) -> None:
    """Print the JSON or show tables, then write JSON and plot where asked for.

    In this order, so that a place that cannot be written does not cost what was measured.
    """
    with reader_may_leave():
        if as_json:
            click.echo(json.dumps(document))
        else:
            show()
    if not as_json and (document.get("others_share") or 0) > _QUIET:
        click.echo(f"Other programs took {document['others_share']:.0%} of the processor meanwhile: measure again on a "
                   "quiet machine before you quote a figure.", err=True)
    if out:
        temporary = out.with_name(f".{out.name}.tmp")
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(document, indent=1) + "\n")
            temporary.replace(out)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            raise OutputError(f"{out} cannot be written ({error.strerror}).") from None
    if plot and draw:
        draw(plot)
