"""PNG plots of benchmark results (matplotlib, optional extra `check`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import MissingRequirementError
from .decode import DecodeBench
from .residency import ResidencyBench


def new_figure(size: tuple[float, float]) -> Any:
    """A figure of so many inches; raises MissingRequirementError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingRequirementError("A plot needs matplotlib; install it with: pip install matplotlib.") from error
    return Figure(figsize=size, layout="constrained")


def save(figure: Any, path: Path) -> None:
    """Write the PNG whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=120)
    temporary.replace(path)


def plot_decode(bench: DecodeBench, path: Path) -> None:
    """Tokens per second against agreement with the uncached result, one point a setting; and the forwards it took."""
    shown = [result for result in bench.results if result.refused is None]
    labels = [f"{r.cache} · {r.acceptance}" + ("" if r.salient == "off" else f" · salient {r.salient}") for r in shown]
    figure = new_figure((10, 1.2 + 0.42 * len(shown)))
    speed, forwards, agreement = figure.subplots(1, 3, sharey=True)
    places = range(len(shown))[::-1]
    colours = ["tab:orange" if r.salient != "off" else "tab:grey" if r.cache == "none" else "tab:blue" for r in shown]
    for axes, title, values in (
            (speed, "tokens per second", [r.tokens_per_second for r in shown]),
            (forwards, "tokens per forward", [r.tokens_per_forward for r in shown]),
            (agreement, "agreement with no cache", [r.agreement or 0 for r in shown])):
        bars = axes.barh(places, values, color=colours)
        axes.bar_label(bars, [f"{value:.3g}" for value in values], padding=2, fontsize=8)
        axes.set_title(title, fontsize=10)
        axes.margins(x=0.18)
        axes.spines[["top", "right"]].set_visible(False)
    speed.set_yticks(places, labels)
    figure.suptitle(f"{bench.prompts} prompts of {bench.prompt_tokens[0]}–{bench.prompt_tokens[1]} tokens, "
                    f"{bench.max_new_tokens} new, {bench.rounds} rounds", fontsize=10)
    save(figure, path)


def plot_residency(bench: ResidencyBench, path: Path) -> None:
    """Tokens per second, hit rate, bytes read and peak memory of every budget, interval and routing."""
    shown = bench.results
    labels = [f"{r.routing} · {r.budget} · {r.interval}" for r in shown]
    figure = new_figure((12, 1.4 + 0.42 * len(shown)))
    places = range(len(shown))[::-1]
    colours = [{"auto": "tab:orange", "–": "tab:grey"}.get(r.interval, "tab:blue") for r in shown]
    columns = figure.subplots(1, 4, sharey=True)
    for axes, title, values in zip(columns, (
            "tokens per second", "hit rate", "read from disk, GB", "peak of experts in memory, GB"), (
            [r.tokens_per_second for r in shown], [r.hit_rate or 0 for r in shown],
            [r.read_bytes / 1e9 for r in shown], [r.peak_expert_bytes / 1e9 for r in shown]), strict=True):
        bars = axes.barh(places, values, color=colours)
        axes.bar_label(bars, [f"{value:.3g}" for value in values], padding=2, fontsize=8)
        axes.set_title(title, fontsize=10)
        axes.margins(x=0.18)
        axes.spines[["top", "right"]].set_visible(False)
    columns[0].set_yticks(places, labels)
    for budget in sorted({r.budget_bytes for r in shown if r.budget_bytes}):
        columns[3].axvline(budget / 1e9, color="black", linewidth=0.8, linestyle=":")
    figure.suptitle(f"{bench.expert_bytes / 1e9:.1f} GB of experts, {bench.max_new_tokens} new tokens, "
                    f"{bench.rounds} rounds; dotted: the budget", fontsize=10)
    save(figure, path)
