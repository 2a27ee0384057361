"""The HTML report of a check: one file that needs no network and no script, and that a person reads in a minute.

The page is `templates/report.html.jinja`; `digest.py`, `answers.py` and `plots.py` prepare what it shows.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from ..errors import MissingRequirementError, OutputError
from ..extras import pip_install
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

    Raises OutputError for what the file system refuses.
    """
    page = render_report(report)
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


def render_report(report: CheckReport) -> str:
    """The page as text."""
    drawn = [_plots(f"b{at}", backend) for at, backend in enumerate(report.backends)]
    return _template().render(report=report, plots=drawn)


@cache
def _template() -> Template:
    environment = Environment(loader=PackageLoader(__package__), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True, finalize=_visible)
    environment.filters |= {"number": digest.number, "percent": digest.percent, "count": digest.count,
                            "size": digest.size, "short": digest.short, "date": digest.date,
                            "quantised": quantisation_in_words}
    environment.globals |= {"answers": answers, "digest": digest}
    return environment.get_template("report.html.jinja")


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
