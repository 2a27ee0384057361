"""Plot of `bench generate`: tokens per second at each context length, ours and the peers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..drawing import COLOURS, GREY, INK, legend_below, new_picture, picture_style, save
from .generate import GenerateBench
from .record import Spread

_HATCHES = ("////", "....", "xxxx")  # one for each peer there is


def plot_generate(bench: GenerateBench, path: Path) -> None:
    """Left: tokens per second; right: how many times ours a peer takes. One colour per cache and coreset.

    Raises MissingRequirementError without matplotlib.
    """
    with picture_style():
        from matplotlib.lines import Line2D
        from matplotlib.patches import Patch

        figure = new_picture(10, 4.8)
        speed, ratio = figure.subplots(1, 2)
        keys = list(dict.fromkeys((r.cache, r.coreset) for r in bench.results))
        lengths = sorted({r.prompt_tokens for r in bench.results})
        peers = list(dict.fromkeys(name for r in bench.results for name in r.peers))
        handles: list[Any] = []
        for i, key in enumerate(keys):
            mine = [r for r in bench.results if (r.cache, r.coreset) == key]
            at, colour = [lengths.index(r.prompt_tokens) for r in mine], COLOURS[i % len(COLOURS)]
            experts = f" ({mine[0].unique_experts:.0f} experts)" if mine[0].unique_experts else ""
            handles.append(Patch(color=colour, label=f"coreset {key[1]}{experts}, cache {key[0]}"))
            for j, name in enumerate([None, *peers]):
                have = [(x, r) for x, r in zip(at, mine, strict=True) if name is None or name in r.peers]
                spreads = [r.peers[name].tokens_per_second if name else r.ours.tokens_per_second for _, r in have]
                _bars(speed, [x for x, _ in have], i * (len(peers) + 1) + j, len(keys) * (len(peers) + 1),
                      [s.median for s in spreads], spreads, colour, j)
                if name:
                    _bars(ratio, [x for x, _ in have], i * len(peers) + j - 1, len(keys) * len(peers),
                          [r.peers[name].ratio for _, r in have], None, colour, j)
        handles.append(Patch(facecolor=GREY, label="this package"))
        handles += [Patch(facecolor="white", edgecolor=GREY, hatch=_HATCHES[j % len(_HATCHES)], label=f"{name} (peer)")
                    for j, name in enumerate(peers)]
        handles.append(Line2D([], [], color=INK, marker="|", linestyle="", markersize=10, label="quartiles of rounds"))
        ratio.axhline(1, color=INK, linewidth=1, linestyle=":")
        handles.append(Line2D([], [], color=INK, linewidth=1, linestyle=":", label="as fast as this package"))
        speed.set(ylabel="speed, new tokens per second", title="Answers, prompt included")
        ratio.set(ylabel="peer's time / ours", title="Ratio in the same round")
        for axes in (speed, ratio):
            axes.set_xticks(range(len(lengths)), [f"{n + bench.max_new_tokens:,}" for n in lengths])
            axes.set_xlabel("context at the end, tokens")
            axes.set_ylim(bottom=0)
            axes.grid(False, axis="x")
        figure.suptitle(f"{bench.model}, {bench.layers} layers, {bench.precision}: {bench.max_new_tokens} new tokens, "
                        f"{bench.steps} steps per block, {bench.limits.threads} threads")
        legend_below(figure, handles, 3)
        save(figure, path)


def _bars(axes: Any, at: list[int], place: int, places: int, values: list[float], spreads: list[Spread] | None,
          colour: str, peer: int) -> None:
    """One bar of a group at each x; `peer` 0 is ours."""
    width = 0.8 / places
    whiskers = [[s.median - s.lower for s in spreads], [s.upper - s.median for s in spreads]] if spreads else None
    axes.bar([x + (place - (places - 1) / 2) * width for x in at], values, 0.9 * width, yerr=whiskers, ecolor=INK,
             capsize=2, edgecolor=colour, **({"color": colour} if not peer else {
                 "facecolor": "white", "hatch": _HATCHES[(peer - 1) % len(_HATCHES)]}))
