"""Opening a bundle to answer requests with it: options of `generate` and `serve`, and a bar while it is verified."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ..bundle.hub import resolve_bundle
from ..bundle.manifest import Manifest
from ..bundle.reader import read_manifest
from ..errors import BundleError
from ..fit.refuse import refuse_unfit
from ..generator import Generator
from .help import option
from .options import BACKEND, CPU_PRODUCTS, THREADS, VERIFY, request_option, seal_options
from .progress import byte_bar

F = TypeVar("F", bound=Callable[..., Any])
_SHOWN_FROM = 200e6  # bytes to verify; less takes no time
_RESIDENCY = (
    option("--expert-budget", metavar="SIZE", group="residency", shown="all",
           help="Memory for experts, such as 4G, 25% or bytes; the others wait on disk (CPU) or in host memory "
           "(TensorRT engine built with --experts resident)"),
    option("--experts-per-layer", type=int, group="residency", values="at least 1", shown="all",
           help="The same, as experts kept per layer"),
    option("--expert-refresh-interval", default="auto", metavar="N", group="residency",
           help="Denoise steps between changes of the experts kept: auto, never or a number"))
MEMORY = option("--memory", metavar="SIZE", group="bundle and machine", shown="what this machine gives a process",
                help="Memory that may be used, such as 8G: what needs more is refused before it is opened")
_NAMES = ("backend", "threads", "cpu_products", "verify", "expert_budget", "experts_per_layer",
          "expert_refresh_interval", "preset", "expect_sha256", "trusted_key")


def opening_options(command: F) -> F:
    """All of them; the verb hands its keywords to `opening_of`."""
    for one in (seal_options, VERIFY, CPU_PRODUCTS, THREADS, BACKEND, *reversed(_RESIDENCY), request_option("preset")):
        command = one(command)
    return command


def opening_of(options: dict[str, Any]) -> dict[str, Any]:
    """Takes the keywords of `Generator.open` out of a verb's."""
    return {name: options.pop(name) for name in _NAMES}


def open_shown(bundle: str | Path, opening: dict[str, Any], quiet: bool = False, **planned: Any) -> Generator:
    """`Generator.open`, with a bar where verifying takes its time.

    `planned`: memory, program, rows, context and prefix cache as `refuse_unfit` takes them; what cannot fit is refused
    as there, before anything is opened.
    """
    folder = resolve_bundle(bundle)
    manifest, done = _manifest(folder), 0
    if manifest:
        asked = {name: opening[name] for name in ("backend", "threads", "expert_budget", "experts_per_layer")}
        refuse_unfit(manifest, name=str(folder), products=opening["cpu_products"], **asked, **planned)
    total = sum(entry.size for entry in manifest.files) if manifest else 0
    with byte_bar("verify", total, shown=total > _SHOWN_FROM and not quiet) as report:

        def progress(count: int) -> None:
            nonlocal done
            done += count
            report("verify", done, total)

        return Generator.open(folder, progress=progress, **opening)


def _manifest(bundle: Path) -> Manifest | None:
    """To know sizes by; of what is no bundle, opening it says why, and whether its seal holds."""
    try:
        return read_manifest(bundle)
    except BundleError:
        return None
