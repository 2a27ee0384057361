"""Tables of simulated cases for a page, and their plot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dmoe_export.drawing import COLOURS, MARKERS, legend_below, new_picture, picture_style, save
from dmoe_export.words import count

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
    """Over rates: what 95 of 100 first blocks take, and the median answer; a band from low to high predictions.

    Only cases that keep up. Raises MissingRequirementError without matplotlib.
    """
    with picture_style():
        from matplotlib.lines import Line2D

        figure = new_picture(10, 4.4)
        first, answer = figure.subplots(1, 2)
        handles: list[Any] = []
        for i, replicas in enumerate(sorted({case.replicas for case, _ in found})):
            mine = [(case.rate, figures) for case, figures in found
                    if case.replicas == replicas and all(one.kept_up for one in figures)]
            colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
            for axes, of in ((first, lambda f: f.first_block.most),
                             (answer, lambda f: f.answer.half)):
                low, high = ([reduce(map(of, figures)) for _, figures in mine] for reduce in (min, max))
                axes.fill_between([rate for rate, _ in mine], low, high, color=colour, alpha=0.25, linewidth=0)
                axes.plot([rate for rate, _ in mine], high, color=colour, marker=marker)
            handles.append(Line2D([], [], color=colour, marker=marker, label=count(replicas, "replica")))
        first.set(title="First block: 95 of 100 wait less than", ylabel="seconds")
        answer.set(title="Whole answer: median", ylabel="seconds")
        rates = sorted({case.rate for case, _ in found})
        for axes in (first, answer):
            axes.set(xlabel="requests a second, at random", xscale="log")
            axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
            axes.set_xticks([], minor=True)
            axes.set_ylim(bottom=0)
        figure.suptitle(title)
        legend_below(figure, handles, 4)
        save(figure, path)
