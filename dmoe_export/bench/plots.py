"""PNG plots of `bench decode` and `bench residency`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..drawing import COLOURS, GREY, INK, bars, legend_below, new_picture, picture_style, save
from .decode import DecodeBench
from .residency import ResidencyBench


def plot_decode(bench: DecodeBench, path: Path) -> None:
    """Tokens per second, tokens per forward and agreement with the uncached result, a bar each for every setting.

    Raises MissingRequirementError without matplotlib.
    """
    with picture_style():
        from matplotlib.patches import Patch

        shown = [result for result in bench.results if result.refused is None]
        kinds = {"no cache": GREY, "cache": COLOURS[0], "salient steps": COLOURS[1]}
        mine = ["salient steps" if r.salient != "off" else "no cache" if r.cache == "none" else "cache" for r in shown]
        figure = new_picture(10, 1.9 + 0.36 * len(shown))
        columns = figure.subplots(1, 3, sharey=True)
        for axes, label, values in zip(columns, (
                "speed, new tokens per second", "new tokens per model forward", "tokens equal to no cache, share"), (
                [r.tokens_per_second for r in shown], [r.tokens_per_forward for r in shown],
                [r.agreement or 0 for r in shown]), strict=True):
            bars(axes, values, [kinds[kind] for kind in mine], label)
        columns[0].set_yticks(range(len(shown))[::-1], [
            f"{r.cache} · {r.acceptance}" + ("" if r.salient == "off" else f" · {r.salient}")
            + ("" if r.schedule == "merged" else f" · {r.schedule}") for r in shown])
        columns[0].set_ylabel("cache · acceptance (· salient)")
        least, most = bench.prompt_tokens
        tokens = f"{least} tokens" if least == most else f"{least} to {most} tokens"
        figure.suptitle(f"{_count(bench.prompts, 'prompt')} of {tokens}, {bench.max_new_tokens} new tokens, "
                        f"{_count(bench.rounds, 'round')}")
        legend_below(figure, [Patch(color=kinds[kind], label=kind) for kind in kinds if kind in mine], 3)
        save(figure, path)


def plot_residency(bench: ResidencyBench, path: Path) -> None:
    """Tokens per second, hit rate, bytes read and peak memory of every budget, interval and routing, a bar each.

    Raises MissingRequirementError without matplotlib.
    """
    with picture_style():
        from matplotlib.lines import Line2D
        from matplotlib.patches import Patch

        shown = bench.results
        kinds = {"auto": ("interval chosen by the policy", COLOURS[1]), "–": ("no budget", GREY)}
        mine = [kinds.get(r.interval, ("fixed interval", COLOURS[0])) for r in shown]
        figure = new_picture(12, 1.9 + 0.36 * len(shown))
        columns = figure.subplots(1, 4, sharey=True)
        for axes, label, values in zip(columns, (
                "speed, new tokens per second", "hit rate, share of uses", "read from disk, GB",
                "peak of experts in memory, GB"), (
                [r.tokens_per_second for r in shown], [r.hit_rate or 0 for r in shown],
                [r.read_bytes / 1e9 for r in shown], [r.peak_expert_bytes / 1e9 for r in shown]), strict=True):
            bars(axes, values, [colour for _, colour in mine], label)
        columns[0].set_yticks(range(len(shown))[::-1], [f"{r.routing} · {r.budget} · {r.interval}" for r in shown])
        columns[0].set_ylabel("routing · budget · interval in steps")
        handles: list[Any] = [Patch(color=colour, label=label) for label, colour in dict.fromkeys(mine)]
        for budget in sorted({r.budget_bytes for r in shown if r.budget_bytes}):
            columns[3].axvline(budget / 1e9, color=INK, linewidth=1, linestyle=":")
        if any(r.budget_bytes for r in shown):
            handles.append(Line2D([], [], color=INK, linewidth=1, linestyle=":", label="the budget"))
        figure.suptitle(f"{bench.expert_bytes / 1e9:.1f} GB of experts, {bench.max_new_tokens} new tokens, "
                        f"{_count(bench.rounds, 'round')}")
        legend_below(figure, handles, 4)
        save(figure, path)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
