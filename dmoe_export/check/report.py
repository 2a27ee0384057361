"""The HTML report of a check: one file that needs no network and no script, and that a person reads in a minute.

The page is `templates/report.html.jinja`; `digest.py`, `answers.py` and `plots.py` prepare what it shows.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from ..errors import MissingRequirementError, OutputError
from ..extras import pip_install
from ..words import count, size
from . import answers, digest
from .result import BackendCheck, CheckReport
from .table import quantisation_in_words

try:
    from . import plots
except ModuleNotFoundError as missing:  # said on import: before minutes of checking, not after
    raise MissingRequirementError(f"--report draws with {missing.name}, which is not installed; install it with: "
                                  f"{pip_install('check')}.") from missing

_VISIBLE = {c: 0x2400 + c for c in range(32) if c not in (9, 10)} | {127: 0x2421}  # control characters as pictures


def write_report(report: CheckReport, path: Path) -> None:
    """Write the report to `path`; whoever reads it meanwhile sees the old file or the new one.

    Names of the bundle's files are links from there to the bundle, if it still lies where it was checked. Raises
    OutputError for what the file system refuses.
    """
    page = render_report(report, _urls(report, path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.partial-", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(page.encode("utf-8", "replace"))  # half a surrogate pair from a model must not stop a report
            Path(name).chmod(0o644)
            Path(name).replace(path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                Path(name).unlink()
    except OSError as error:
        raise OutputError(f"Report {path} could not be written: {error.strerror or error}; choose another "
                          "--report.") from error


def render_report(report: CheckReport, urls: Mapping[str, str] | None = None) -> str:
    """The page as text; `urls` of the bundle and of files in it, by the names the report has for them."""
    known = urls or {}

    def link(name: str) -> str:
        return Markup('<a href="{}">{}</a>').format(known[name], _visible(name)) if name in known else name

    drawn = [_plots(f"b{at}", backend) for at, backend in enumerate(report.backends)]
    return _template().render(report=report, plots=drawn, link=link)


@cache
def _template() -> Template:
    environment = Environment(loader=PackageLoader(__package__), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True, finalize=_visible)
    environment.filters |= {"number": _whole(digest.number), "percent": _whole(digest.percent), "count": count,
                            "size": _whole(size), "short": digest.short, "date": _whole(digest.date),
                            "whole": _whole(str),
                            "quantised": quantisation_in_words}
    environment.globals |= {"answers": answers, "digest": digest}
    return environment.get_template("report.html.jinja")


def _whole(words: Callable[[Any], str]) -> Callable[[Any], Markup]:
    """A filter whose result stays on one line."""
    return lambda value: Markup('<span class="whole">{}</span>').format(_visible(words(value)))


def _urls(report: CheckReport, path: Path) -> dict[str, str]:
    """Of the bundle's folder and files that the report names, relative to the report, where they exist."""
    folder = Path(report.bundle)
    if not folder.is_dir():
        return {}
    names = {engine.file for engine in report.engines} | {b.what_ran.partition(" ")[0] for b in report.backends}
    base = Path(os.path.relpath(folder.resolve(), path.parent.resolve()))
    return {report.bundle: quote(base.as_posix())} | {
        name: quote((base / name).as_posix()) for name in sorted(names) if (folder / name).is_file()}


class Plot(NamedTuple):
    """A figure with its heading and one line on how to read it."""

    title: str
    reading: str
    svg: Markup


def _plots(prefix: str, backend: BackendCheck) -> list[Plot]:
    layers = bool(backend.layers_alone or backend.layers_in_sequence)
    figures = [
        ("Error per layer", "Lower is better; dotted: the gates.",
         plots.layer_error(f"{prefix}-error", backend) if layers else None),
        ("Norm ratio per layer", "On 1 is right; dotted: the gates.",
         plots.norm_ratio(f"{prefix}-norm", backend) if layers else None),
        ("Router agreement per layer", "100 %: same experts for every token.",
         plots.router_agreement(f"{prefix}-router", backend)),
        ("Confidence", "A dot is a position; on the diagonal is right.",
         plots.confidence(f"{prefix}-confidence", backend.confidence)),
        ("Unique experts per denoise step", "Both lines should coincide; bands are over prompts.",
         plots.unique_experts(f"{prefix}-experts", backend)),
    ]
    return [Plot(title, reading, Markup(svg)) for title, reading, svg in figures if svg]


def _visible(value: object) -> object:
    """Control characters as pictures: a page shows what a model said, and obeys none of it."""
    return value.translate(_VISIBLE) if isinstance(value, str) and not isinstance(value, Markup) else value
