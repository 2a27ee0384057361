"""Tables of simulated cases for a page, and their plot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dmoe_export.drawing import COLOURS, MARKERS, legend_below, new_picture, picture_style, save

from .figures import Case, Figures

Found = Sequence[tuple[Case, Sequence[Figures]]]


def cell(figures: Sequence[Figures], of: Callable[[Figures], float], digits: int) -> str:
    """A number, or two: of predictions low … high."""
    return " … ".join(dict.fromkeys(f"{of(one):.{digits}f}" for one in figures))


def markdown(found: Found, of: Callable[[Figures], float], digits: int) -> str:
    """A row for each load, a column for each number of replicas; – where a bound does not keep up."""
    replicas = sorted({case.replicas for case, _ in found})
    loads = list(dict.fromkeys(case.load for case, _ in found))
    known = {(case.load, case.replicas): figures for case, figures in found}
    lines = ["| load | " + " | ".join(map(str, replicas)) + " |", "|---" * (1 + len(replicas)) + "|"]
    for load in loads:
        cells = [cell(known[load, n], of, digits) if all(one.kept_up for one in known[load, n]) else "–"
                 for n in replicas]
        lines.append(f"| {load} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(found: Found, title: str, path: Path) -> None:
    """Over rates: 95 of 100 first blocks, and replica hours per million tokens; a band from low to high predictions.

    Only cases that keep up. Raises MissingRequirementError without matplotlib.
    """
    with picture_style():
        from matplotlib.lines import Line2D

        figure = new_picture(10, 4.4)
        first, price = figure.subplots(1, 2)
        handles: list[Any] = []
        for i, replicas in enumerate(sorted({case.replicas for case, _ in found})):
            mine = [(case.rate, figures) for case, figures in found
                    if case.replicas == replicas and all(one.kept_up for one in figures)]
            colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
            for axes, of in ((first, lambda f: f.first_block.most),
                             (price, lambda f: f.replica_hours_per_million_tokens)):
                low, high = ([reduce(map(of, figures)) for _, figures in mine] for reduce in (min, max))
                axes.fill_between([rate for rate, _ in mine], low, high, color=colour, alpha=0.25, linewidth=0)
                axes.plot([rate for rate, _ in mine], high, color=colour, marker=marker)
            handles.append(Line2D([], [], color=colour, marker=marker, label=f"{replicas} replicas"))
        first.set(title="First block: 95 of 100 wait less than", ylabel="seconds")
        price.set(title="Price: replica hours per million tokens", ylabel="hours")
        for axes in (first, price):
            axes.set(xlabel="requests a second, at random", xscale="log", yscale="log")
        figure.suptitle(title)
        legend_below(figure, handles, 4)
        save(figure, path)
