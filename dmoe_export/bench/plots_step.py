"""Plot of `bench step`: latency against experts and against context, and where the time goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..drawing import COLOURS, GREY, MARKERS, ON, VALUE, line_through, new_picture, picture_style, save
from .parts import PARTS
from .step import StepBench, StepResult


def plot_step(bench: StepBench, path: Path) -> None:
    """Three panels; whiskers: quartiles, hollow: the step's matrix products alone, each timed by itself.

    Raises MissingRequirementError without matplotlib.
    """
    with picture_style():
        figure = new_picture(14, 4.6 + 0.1 * len(bench.results))
        experts, context, share = figure.subplots(1, 3, width_ratios=[1, 1, 1.4])
        _lines(experts, bench.results, "unique experts per layer, mean", lambda r: r.cached, "{} cached",
               lambda r: sum(r.unique_experts) / max(1, len(r.unique_experts)))
        _lines(context, bench.results, "cached tokens", lambda r: r.active_experts, "{} experts",
               lambda r: r.cached)
        _shares(share, bench)
        limits = bench.limits
        figure.suptitle(f"{bench.model}, {bench.layers} layers, {bench.precision}: one {bench.phase} forward of "
                        f"{bench.tokens} tokens on {limits.threads} threads, which read {limits.read_gb_per_s:.0f} "
                        f"GB/s and compute {limits.gflop_per_s:.0f} GFLOP/s")
        save(figure, path)


def _experts(result: StepResult) -> str:
    return "–".join(str(n) for n in sorted({min(result.unique_experts), max(result.unique_experts)})) \
        if result.unique_experts else "none"


def _lines(axes: Any, results: list[StepResult], label: str, group: Any, name: str, place: Any) -> None:
    """Step and products over `place`, one colour and marker per group."""
    from matplotlib.lines import Line2D

    handles = []
    for i, key in enumerate(dict.fromkeys(map(group, results))):
        mine = sorted((r for r in results if group(r) == key), key=place)
        at, colour, marker = [place(r) for r in mine], COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        spreads = [r.seconds for r in mine]
        axes.errorbar(at, [1e3 * s.median for s in spreads],
                      [[1e3 * (s.median - s.lower) for s in spreads], [1e3 * (s.upper - s.median) for s in spreads]],
                      color=colour, marker=marker, capsize=2, linestyle=line_through(at, "-"))
        axes.plot(at, [1e3 * r.products_seconds.median for r in mine], color=colour, marker=marker, fillstyle="none",
                  linestyle=line_through(at, ":"))
        handles.append(Line2D([], [], color=colour, marker=marker, linestyle="",
                              label=name.format("all chosen" if key is None else key)))
    handles += [Line2D([], [], color=GREY, marker="o", linestyle="", label="whole step, quartiles"),
                Line2D([], [], color=GREY, marker="o", linestyle="", fillstyle="none",
                       label="its matrix products alone")]
    axes.set(xlabel=label, ylabel="time of a forward, ms")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.08)
    axes.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)


def _shares(axes: Any, bench: StepBench) -> None:
    """Stacked bars of the profile, one per setting."""
    places = range(len(bench.results))[::-1]
    left = [0.0] * len(bench.results)
    for i, part in enumerate(PARTS):
        values = [100 * r.profile_milliseconds[part] / sum(r.profile_milliseconds.values()) for r in bench.results]
        drawn = axes.barh(places, values, left=left, color=COLOURS[i], label=part, edgecolor="white", linewidth=0.5)
        axes.bar_label(drawn, [f"{value:.0f} %" if value > 5 else "" for value in values], label_type="center",
                       fontsize=VALUE, color=ON[COLOURS[i]])
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.set_yticks(places, [f"{_experts(r)} · {r.cached}" for r in bench.results])
    axes.set(xlabel="share of the time of a profiled run, %", ylabel="unique experts per layer · cached tokens",
             xlim=(0, 100))
    axes.grid(False)
    axes.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
