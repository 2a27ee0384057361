"""Plot of `bench generate`: tokens per second against context length, ours and the peer's."""

from __future__ import annotations

from pathlib import Path

from .generate import GenerateBench
from .plots import new_figure, save


def plot_generate(bench: GenerateBench, path: Path) -> None:
    """Left: tokens per second; right: how many times the peer's time. One colour per cache and coreset."""
    figure = new_figure((10, 4.6))
    speed, ratio = figure.subplots(1, 2)
    for i, key in enumerate(dict.fromkeys((r.cache, r.coreset) for r in bench.results)):
        mine = sorted((r for r in bench.results if (r.cache, r.coreset) == key), key=lambda r: r.prompt_tokens)
        label = f"coreset {key[1]} ({mine[0].unique_experts:.0f} experts), cache {key[0]}"
        at = [r.prompt_tokens + bench.max_new_tokens for r in mine]
        for side, style, name in (("ours", "-", label), ("peer", ":", None)):
            spreads = [(place, getattr(r, side).tokens_per_second) for place, r in zip(at, mine, strict=True)
                       if getattr(r, side)]
            speed.errorbar([place for place, _ in spreads], [s.median for _, s in spreads],
                           [[s.median - s.lower for _, s in spreads], [s.upper - s.median for _, s in spreads]],
                           color=f"C{i}", linestyle=style, marker="o", capsize=2, label=name,
                           fillstyle="full" if side == "ours" else "none")
        ratios = [(place, r.ratio) for place, r in zip(at, mine, strict=True) if r.ratio is not None]
        ratio.plot([place for place, _ in ratios], [value for _, value in ratios], color=f"C{i}", marker="o",
                   label=label)
    speed.set(xlabel="prompt and new tokens", ylabel="new tokens per second",
              title="solid: ours, dotted: eager PyTorch")
    ratio.set(xlabel="prompt and new tokens", ylabel="eager PyTorch's time / ours", title="ratio of the same round")
    ratio.axhline(1, color="black", linewidth=0.8)
    for axes in (speed, ratio):
        axes.set_ylim(bottom=0)
        axes.title.set_fontsize(9)
        axes.legend(fontsize=8)
    figure.suptitle(f"{bench.model}, {bench.layers} layers, {bench.precision}: {bench.max_new_tokens} new tokens, "
                    f"{bench.steps} steps per block, {bench.limits.threads} threads", fontsize=10)
    save(figure, path)
