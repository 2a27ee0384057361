"""Plot of `bench serve`: tokens per second and waiting at each number of clients, joining and closed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..drawing import COLOURS, GREY, INK, MARKERS, legend_below, new_picture, picture_style, save
from .serve import ServeBench


def plot_serve(bench: ServeBench, path: Path) -> None:
    """Left: tokens per second; middle and right: seconds to the first block and to the end, median and 95 of 100.

    Raises MissingRequirementError without matplotlib.
    """
    with picture_style():
        from matplotlib.lines import Line2D

        figure = new_picture(11, 4.4)
        speed, first, whole = figure.subplots(1, 3)
        at = list(range(len(bench.results)))
        for i, name in enumerate(("joining", "closed")):
            ways = [getattr(r, name) for r in bench.results]
            rates = [way.tokens_per_second for way in ways]
            speed.errorbar(at, [r.median for r in rates], yerr=[[r.median - r.lower for r in rates],
                                                              [r.upper - r.median for r in rates]],
                           color=COLOURS[i], marker=MARKERS[i], linestyle="", capsize=3)
            for axes, kind in ((first, "first_block"), (whole, "answer")):
                times = [getattr(way, kind) for way in ways]
                shift = 0.12 * (2 * i - 1)
                axes.vlines([x + shift for x in at], [t.half for t in times], [t.most for t in times], color=COLOURS[i],
                            linewidth=1.5)
                axes.plot([x + shift for x in at], [t.half for t in times], color=COLOURS[i], marker=MARKERS[i],
                          linestyle="")
        alone = bench.overhead.alone.tokens_per_second.median
        speed.axhline(alone, color=INK, linewidth=1, linestyle=":")
        speed.set(ylabel="answer tokens per second", title="All clients together")
        first.set(ylabel="seconds", title="To the first block")
        whole.set(ylabel="seconds", title="To the end")
        for axes in (speed, first, whole):
            axes.set_xticks(at, [str(r.clients) for r in bench.results])
            axes.set_xlabel("clients, each with one request at a time")
            axes.set_ylim(bottom=0)
            axes.set_xlim(-0.5, len(at) - 0.5)
            axes.grid(False, axis="x")
        figure.suptitle(f"{bench.model}, {bench.layers} layers, {bench.precision}: prompts of "
                        f"{_words(bench.prompt_tokens)}, answers of {_words(bench.new_tokens)} tokens, "
                        f"{bench.threads} threads")
        handles: list[Any] = [
            Line2D([], [], color=COLOURS[0], marker=MARKERS[0], linestyle="", label="server: rows join at any step"),
            Line2D([], [], color=COLOURS[1], marker=MARKERS[1], linestyle="", label="closed batches, no server"),
            Line2D([], [], color=INK, linewidth=1, linestyle=":", label="one request at a time, no server"),
            Line2D([], [], color=GREY, marker="|", linestyle="", markersize=10,
                   label="quartiles of rounds; seconds: from the median to 95 of 100 requests")]
        legend_below(figure, handles, 2)
        save(figure, path)


def _words(lengths: tuple[int, int]) -> str:
    return f"{lengths[0]} to {lengths[1]}"
