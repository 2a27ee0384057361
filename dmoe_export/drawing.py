"""How every plot of this package looks: colours that colour-blind readers tell apart, one size of each kind of text.

Plots of the report (check/plots.py) are SVG inside a page, those of benchmarks PNG files. matplotlib is imported where
something is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import MissingRequirementError

INK, FAINT, GREY, BAD = "#1d2530", "#d9dee5", "#69727d", "#b00020"
COLOURS = ("#0b5cad", "#c45a00", "#009e73", "#a3478b", "#56b4e9", "#e0a100", "#69727d")  # after Okabe and Ito
MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # so that no colour stands alone
STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"], "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.edgecolor": GREY, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.axisbelow": True, "grid.color": FAINT, "grid.linewidth": 0.7, "lines.linewidth": 1.5,
    "legend.frameon": False}
PICTURE: dict[Any, Any] = STYLE | {
    "font.size": 10, "axes.titlesize": 10, "axes.labelsize": 10, "figure.titlesize": 11, "figure.labelsize": 10,
    "xtick.labelsize": 9, "ytick.labelsize": 9, "legend.fontsize": 9, "savefig.dpi": 120}
ON = dict(zip(COLOURS, ("white", "white", "white", "white", INK, INK, "white"), strict=True))  # text on a colour
VALUE = 8.5  # size of a number at a bar


def new_picture(width: float, height: float) -> Any:
    """A figure of so many inches; to be drawn and saved under `picture_style`."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def picture_style() -> Any:
    """A context in which PNG pictures are drawn; raises MissingRequirementError without matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise MissingRequirementError("A plot needs matplotlib; install it with: pip install matplotlib.") from error
    return matplotlib.rc_context(PICTURE)


def save(figure: Any, path: Path) -> None:
    """Write the PNG whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        figure.savefig(temporary, format="png")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def line_through(points: Sequence[Any], line: str) -> str:
    """A line's style; none through one or two points, which say nothing of what lies between."""
    return line if len(points) > 2 else ""


def bars(axes: Any, values: Sequence[float], colours: Sequence[str], label: str) -> None:
    """Horizontal bars from top to bottom, each with its number."""
    drawn = axes.barh(range(len(values))[::-1], values, color=list(colours))
    for text in axes.bar_label(drawn, [number(value) for value in values], padding=3, fontsize=VALUE):
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.8})
    axes.set_xlabel(label)
    axes.margins(x=0.22)
    axes.grid(False, axis="y")
    axes.locator_params(axis="x", nbins=5)


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def legend_below(figure: Any, handles: Sequence[Any], columns: int) -> None:
    """One legend of the whole figure, under it."""
    figure.legend(handles=list(handles), loc="outside lower center", ncols=columns)
