"""Plot of `bench generate`: tokens per second against context length, ours and the peers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .generate import GenerateBench
from .plots import new_figure, save
from .record import Spread

_STYLES = (":", "--", "-.")  # one for each peer there is


def plot_generate(bench: GenerateBench, path: Path) -> None:
    """Left: tokens per second; right: how many times ours a peer takes. One colour per cache and coreset."""
    figure = new_figure((10, 4.6))
    speed, ratio = figure.subplots(1, 2)
    for i, key in enumerate(dict.fromkeys((r.cache, r.coreset) for r in bench.results)):
        mine = sorted((r for r in bench.results if (r.cache, r.coreset) == key), key=lambda r: r.prompt_tokens)
        label = f"coreset {key[1]} ({mine[0].unique_experts:.0f} experts), cache {key[0]}"
        at = [r.prompt_tokens + bench.max_new_tokens for r in mine]
        _line(speed, at, [r.ours.tokens_per_second for r in mine], f"C{i}", "-", label)
        for name, style in zip(mine[0].peers, _STYLES, strict=False):
            _line(speed, at, [r.peers[name].tokens_per_second for r in mine], f"C{i}", style, name)
            ratio.plot(at, [r.peers[name].ratio for r in mine], color=f"C{i}", linestyle=style, marker="o",
                       label=f"{name}: {label}")
    speed.set(xlabel="prompt and new tokens", ylabel="new tokens per second",
              title="answers, prompt included")
    ratio.set(xlabel="prompt and new tokens", ylabel="peer's time / ours", title="ratio of the same round")
    ratio.axhline(1, color="black", linewidth=0.8)
    for axes in (speed, ratio):
        axes.set_ylim(bottom=0)
        axes.title.set_fontsize(9)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
    figure.suptitle(f"{bench.model}, {bench.layers} layers, {bench.precision}: {bench.max_new_tokens} new tokens, "
                    f"{bench.steps} steps per block, {bench.limits.threads} threads", fontsize=10)
    save(figure, path)


def _line(axes: Any, at: list[int], spreads: list[Spread], colour: str, style: str, label: str) -> None:
    axes.errorbar(at, [s.median for s in spreads], [[s.median - s.lower for s in spreads],
                                                    [s.upper - s.median for s in spreads]],
                  color=colour, linestyle=style, marker="o", capsize=2, label=label,
                  fillstyle="full" if style == "-" else "none")
