"""Plot of `bench step`: latency against experts and against context, and where the time goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .parts import PARTS
from .plots import new_figure, save
from .step import StepBench, StepResult


def plot_step(bench: StepBench, path: Path) -> None:
    """Three panels; shaded or whiskered: quartiles, hollow: the step's matrix products alone."""
    figure = new_figure((14, 4.6 + 0.1 * len(bench.results)))
    experts, context, share = figure.subplots(1, 3, width_ratios=[1, 1, 1.4])
    _lines(experts, bench.results, "unique experts per layer", lambda r: r.cached, "cached",
           lambda r: sum(r.unique_experts) / max(1, len(r.unique_experts)))
    _lines(context, bench.results, "cached tokens", lambda r: r.active_experts or "natural", "experts",
           lambda r: r.cached)
    _shares(share, bench)
    limits = bench.limits
    figure.suptitle(f"{bench.model}, {bench.layers} layers, {bench.precision}: one {bench.phase} forward of "
                    f"{bench.tokens} tokens on {limits.threads} threads ({limits.read_gb_per_s:.0f} GB/s, "
                    f"{limits.gflop_per_s:.0f} GFLOP/s)", fontsize=10)
    save(figure, path)


def _experts(result: StepResult) -> str:
    return "–".join(str(n) for n in sorted({min(result.unique_experts), max(result.unique_experts)})) \
        if result.unique_experts else "none"


def _lines(axes: Any, results: list[StepResult], label: str, group: Any, group_name: str, place: Any) -> None:
    """Step and products over `place`, one colour per group."""
    for i, key in enumerate(dict.fromkeys(map(group, results))):
        mine = sorted((r for r in results if group(r) == key), key=place)
        at, colour = [place(r) for r in mine], f"C{i}"
        spreads = [r.seconds for r in mine]
        axes.errorbar(at, [1e3 * s.median for s in spreads],
                      [[1e3 * (s.median - s.lower) for s in spreads], [1e3 * (s.upper - s.median) for s in spreads]],
                      color=colour, marker="o", capsize=2, label=f"{key} {group_name}")
        axes.plot(at, [1e3 * r.products_seconds.median for r in mine], color=colour, marker="o", fillstyle="none",
                  linestyle=":")
    axes.set(xlabel=label, ylabel="milliseconds", title="step (solid), its matrix products alone (dotted)")
    axes.set_ylim(bottom=0)
    axes.title.set_fontsize(9)
    axes.legend(fontsize=8)


def _shares(axes: Any, bench: StepBench) -> None:
    """Stacked bars of the profile, one per setting."""
    places = range(len(bench.results))[::-1]
    left = [0.0] * len(bench.results)
    for i, part in enumerate(PARTS):
        values = [r.profile_milliseconds[part] / sum(r.profile_milliseconds.values()) for r in bench.results]
        bars = axes.barh(places, values, left=left, color=f"C{i}", label=part)
        axes.bar_label(bars, [f"{value:.0%}" if value > 0.04 else "" for value in values], label_type="center",
                       fontsize=7, color="white")
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.set_yticks(places, [f"{_experts(r)} experts, {r.cached} cached" for r in bench.results], fontsize=8)
    axes.set_title("share of time by part (profiled run)", fontsize=9)
    axes.legend(fontsize=7, ncols=len(PARTS), loc="upper center", bbox_to_anchor=(0.5, -0.06), columnspacing=0.8)
    axes.set_xlim(0, 1)
    axes.spines[["top", "right"]].set_visible(False)
