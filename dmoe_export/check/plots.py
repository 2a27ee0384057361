"""Plots of the report: one SVG text per figure, to be put inline into HTML.

Drawn with matplotlib's object interface, so no display is needed. Text stays text, ids carry the plot's name so that no
two figures of a page share one, nothing in them points outside the page, and no text from a model or a user gets in.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from io import StringIO
from itertools import zip_longest
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from ..drawing import BAD, COLOURS, STYLE, line_through
from . import digest
from .result import BackendCheck, ConfidencePoint, Gate, LayerCheck

WIDTH, HEIGHT = 400, 280  # SVG units; readable both three to a row and on a telephone
REFERENCE, BACKEND = COLOURS[:2]
SMALLEST = 1e-12  # differing in the last bit of float32; what is less is drawn on the floor of the axis
NORM_CEILING = 3.0  # ratios above it are drawn at it: the plot is about departures from 1
MOST_POINTS = 1500
SVG: dict[Any, Any] = STYLE | {
    "svg.fonttype": "none", "font.size": 13, "legend.fontsize": 12.5, "legend.handlelength": 1.5,
    "legend.columnspacing": 1.2, "legend.borderpad": 0.0}


class Series(NamedTuple):
    """One way in which all layers were measured, and how it is drawn."""

    how: str
    of: str
    layers: Sequence[LayerCheck]
    colour: str
    marker: str
    line: str

    @property
    def size(self) -> float:
        """Of a marker."""
        return 5.5 if len(self.layers) <= 24 else 3.5


def layer_error(name: str, backend: BackendCheck) -> str:
    """1 − cosine per layer, log axis: of the worst token alone, of the mean token in sequence, as the gates ask."""
    with matplotlib.rc_context(SVG):
        figure, axes = _canvas("layer", "1 − cosine")
        limits = {s.how: [1 - limit for limit in _limits(backend.gates, s.how, "cosine")] for s in _series(backend)}
        drawn = {s.how: [_error(c, s.how) for c in s.layers] for s in _series(backend)}
        finite = [e for errors in drawn.values() for e in errors if digest.finite(e)]
        lines = [limit for group in limits.values() for limit in group if limit > 0]
        high = max([*finite, *lines, 10 * SMALLEST])
        top = 10.0 ** math.ceil(math.log10(high) + 0.25)
        low = max(SMALLEST, min([*finite, *lines, top / 100]))
        bottom = max(SMALLEST, 10.0 ** math.floor(math.log10(low) - 0.05))
        told = False
        for s in _series(backend):
            errors = [min(max(e, bottom), top) if digest.finite(e) else top for e in drawn[s.how]]
            axes.plot([c.layer for c in s.layers], errors, linestyle=line_through(errors, s.line), color=s.colour,
                      marker=s.marker, label=f"{s.how}, {s.of}", markersize=s.size, clip_on=False)
            failed = [(c.layer, e) for c, e in zip(s.layers, errors, strict=True) if not c.passed]
            axes.plot([x for x, _ in failed], [e for _, e in failed], "X", color=BAD, markersize=9, zorder=5,
                      markeredgecolor="white", clip_on=False, label="failed" if failed and not told else None)
            told |= bool(failed)
            _name_infinite(axes, s.layers, drawn[s.how], top)
            _gate_lines(axes, (limit for limit in limits[s.how] if bottom <= limit <= top), s)
        axes.set_yscale("log")
        axes.set_ylim(bottom, top)
        axes.yaxis.set_major_locator(LogLocator(base=10, numticks=7))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _power(y)))
        axes.yaxis.set_minor_locator(NullLocator())
        _layer_axis(axes, backend)
        return _svg(name, figure, f"Error per layer: {_range(finite)}; lower is better")


def norm_ratio(name: str, backend: BackendCheck) -> str:
    """|backend| / |reference| per layer, hull over what is compared: of all tokens alone, of means in sequence."""
    with matplotlib.rc_context(SVG):
        figure, axes = _canvas("layer", "norm ratio, range")
        ends: list[float] = []
        for place, s in enumerate(_series(backend)):
            x = [c.layer + (0.14 if place else -0.14) for c in s.layers]
            hulls = [_hull(c, s.how) for c in s.layers]
            low, high = [_ratio(a) for a, _ in hulls], [_ratio(b) for _, b in hulls]
            axes.vlines(x, low, high, color=s.colour, linewidth=2)
            for values in (low, high):
                axes.plot(x, values, s.marker, color=s.colour, markersize=s.size - 1.5, clip_on=False,
                          label=f"{s.how}, {'tokens' if s.how == 'alone' else s.of}" if values is low else None)
            _name_infinite(axes, s.layers, [a + b for a, b in hulls], NORM_CEILING)
            limits = _norm_limits(backend.gates, s.how)
            _gate_lines(axes, limits, s)
            ends += low + high + limits
        reach = max([abs(e - 1) for e in ends] + [1e-6]) * 1.15
        axes.axhline(1.0, color="#8b95a1", linewidth=0.8, zorder=1)
        axes.set_ylim(max(0.0, 1 - reach), 1 + reach)
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.8g}"))
        _layer_axis(axes, backend)
        return _svg(name, figure, f"Norm ratio per layer: {_range(ends)}; 1 is best")


def router_agreement(name: str, backend: BackendCheck) -> str | None:
    """Share of tokens with the reference's set of experts, per MoE layer; None for a model without a router."""
    shares = [c.router.share for s in _series(backend) for c in s.layers if c.router]
    if not shares:
        return None
    with matplotlib.rc_context(SVG):
        figure, axes = _canvas("layer", "tokens with the same experts")
        lowest = min([100 * share for share in shares] + [95])
        for s in _series(backend):
            routed = [(c.layer, 100 * c.router.share) for c in s.layers if c.router]
            axes.plot([x for x, _ in routed], [y for _, y in routed], color=s.colour, marker=s.marker,
                      linestyle=line_through(routed, s.line), label=s.how, markersize=s.size, clip_on=False)
            limits = [100 * limit for limit in _limits(backend.gates, s.how, "share") if limit > 0]
            _gate_lines(axes, limits, s)
            lowest = min([lowest, *limits])
        axes.set_ylim(max(0.0, 5 * math.floor((lowest - 1) / 5)), 100)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g} %"))
        _layer_axis(axes, backend)
        return _svg(name, figure, f"Router agreement per layer: least {100 * min(shares):.2f} %")


def confidence(name: str, points: Sequence[ConfidencePoint]) -> str | None:
    """Probability of the best token, reference against backend; None if there is no finite point."""
    points = [p for p in points if math.isfinite(p.reference) and math.isfinite(p.backend)]
    if not points:
        return None
    different = [p for p in points if not p.same_token]
    same = _thinned([p for p in points if p.same_token], MOST_POINTS)
    with matplotlib.rc_context(SVG):
        figure, axes = _canvas("confidence of the reference", "confidence of the backend")
        axes.plot([0, 1], [0, 1], color="#8b95a1", linewidth=0.8, zorder=1)
        unlike = _thinned(different, MOST_POINTS)
        for legend, group, colour, marker, size in (("same token", same, REFERENCE, "o", 4.5),
                                                    ("different token", unlike, BACKEND, "X", 7)):
            axes.plot([p.reference for p in group], [p.backend for p in group], marker, color=colour, markersize=size,
                      markeredgecolor="white", markeredgewidth=0.4, alpha=0.8, label=legend, clip_on=False)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        _legend(figure)
        return _svg(name, figure, f"Confidence of {len(points)} positions; {len(different)} with a different token")


def unique_experts(name: str, backend: BackendCheck) -> str | None:
    """Different experts per MoE layer in use at each denoise step, mean over prompts; None without generations."""
    reference = [g.reference_unique_experts for g in backend.generations if g.reference_unique_experts]
    ours = [g.backend_unique_experts for g in backend.generations if g.backend_unique_experts]
    if not reference and not ours:
        return None
    with matplotlib.rc_context(SVG):
        figure, axes = _canvas("denoise step", "experts per layer")
        highest = 0.0
        for legend, runs, colour, marker, line, wide in (("reference", reference, REFERENCE, "o", "-", 6.5),
                                                         ("backend", ours, BACKEND, "s", "--", 3.5)):
            steps = [[v for v in column if v is not None and math.isfinite(v)] for column in zip_longest(*runs)]
            drawn = [(at, values) for at, values in enumerate(steps, start=1) if values]
            x = [at for at, _ in drawn]
            if len(runs) > 1:
                axes.fill_between(x, [min(v) for _, v in drawn], [max(v) for _, v in drawn], color=colour, alpha=0.12,
                                  linewidth=0)
            axes.plot(x, [sum(v) / len(v) for _, v in drawn], color=colour, marker=marker, label=legend,
                      linestyle=line_through(x, line), markersize=wide if len(x) <= 32 else wide / 2)
            highest = max([highest, *(max(v) for _, v in drawn)])
        axes.set_ylim(0, highest * 1.1 or 1)
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        _legend(figure)
        return _svg(name, figure, "Unique experts per denoise step, reference and backend")


def _series(backend: BackendCheck) -> list[Series]:
    both = (Series("alone", "worst", backend.layers_alone, REFERENCE, "o", "-"),
            Series("in sequence", "mean", backend.layers_in_sequence, BACKEND, "s", "--"))
    return [series for series in both if series.layers]


def _error(check: LayerCheck, how: str) -> float:
    """Largest 1 − cosine of what is compared of the layer; NaN wins, for it is worse than any number."""
    errors = [1 - (e.cosine_worst if how == "alone" else e.cosine_mean) for e in digest.tensors(check)]
    return math.nan if any(math.isnan(e) for e in errors) else max(errors)


def _hull(check: LayerCheck, how: str) -> tuple[float, float]:
    """Least and largest norm ratio of what is compared of the layer; infinite if one is not a number."""
    errors = digest.tensors(check)
    means = [e.norm_ratio_mean for e in errors if e.norm_ratio_mean is not None] if how != "alone" else []
    low, high = means or [e.norm_ratio_low for e in errors], means or [e.norm_ratio_high for e in errors]
    return (min(low), max(high)) if all(map(digest.finite, low + high)) else (0.0, math.inf)


def _limits(gates: Iterable[Gate], how: str, *words: str) -> list[float]:
    """Different limits of the gates on layers in this manner whose name has one of the words."""
    return sorted({g.limit for g in gates if any(word in g.name.lower() for word in words)
                   and "layer" in g.where.lower() and how in g.where.lower()})


def _norm_limits(gates: Iterable[Gate], how: str) -> list[float]:
    """Limits as ratios; a gate may hold the ratio or its distance from 1."""
    limits = _limits(gates, how, "norm")
    return sorted({end for limit in limits for end in ((1 - limit, 1 + limit) if limit < 0.5 else (limit,))})


def _ratio(value: float) -> float:
    return min(max(value, 0.0), NORM_CEILING)


def _thinned(points: Sequence[ConfidencePoint], most: int) -> list[ConfidencePoint]:
    """At most `most` points, evenly taken."""
    return [points[i * len(points) // most] for i in range(most)] if len(points) > most else list(points)


def _canvas(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(dpi=72, figsize=(WIDTH / 72, HEIGHT / 72), layout="constrained", facecolor="none")
    axes = figure.add_subplot(facecolor="none")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.tick_params(length=0, pad=5)
    return figure, axes


def _name_infinite(axes: Axes, layers: Sequence[LayerCheck], values: Sequence[float], at: float) -> None:
    """Say which point stands for no number at all."""
    for check, value in zip(layers, values, strict=True):
        if not digest.finite(value):
            left = check.layer > (layers[0].layer + layers[-1].layer) / 2
            axes.annotate("not finite", (check.layer, at), (-9 if left else 9, -11), textcoords="offset points",
                          ha="right" if left else "left", color=BAD, fontweight="bold")
            return  # the first is the cause of the rest


def _gate_lines(axes: Axes, limits: Iterable[float], series: Series) -> None:
    """Dotted, in the colour of what is held against them."""
    for limit in limits:
        axes.axhline(limit, color=series.colour, linewidth=1.5, linestyle=(0, (1.5, 1.5)), zorder=2)


def _layer_axis(axes: Axes, backend: BackendCheck) -> None:
    """Whole layers on the x axis, the first bad one on a red band."""
    layers = [c.layer for s in _series(backend) for c in s.layers] or [0]
    axes.set_xlim(min(layers) - 0.5, max(layers) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True, min_n_ticks=1))
    axes.grid(False, axis="x")
    if backend.first_bad_layer is not None:
        bad = backend.first_bad_layer
        axes.axvspan(bad - 0.5, bad + 0.5, color=BAD, alpha=0.13, linewidth=0, zorder=0, label=f"first bad: {bad}")
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    _legend(figure)


def _legend(figure: Figure) -> None:
    told = sum(len(axes.get_legend_handles_labels()[1]) for axes in figure.axes)
    figure.legend(loc="outside upper left", ncols=3 if told <= 3 else 2)  # four abreast are wider than the plot


def _power(value: float) -> str:
    """10⁻³, with the floor of the axis named as what it is."""
    exponent = round(math.log10(value))
    text = "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return ("≤ " if value <= SMALLEST * 1.01 else "") + {0: "1", 1: "10"}.get(exponent, text)


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.3g} to {max(values):.3g}" if values else "no finite number"


def _svg(name: str, figure: Figure, label: str) -> str:
    """The figure as an SVG element that may stand in any page beside others."""
    text = StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):  # the same report gives the same bytes
        figure.savefig(text, format="svg")
    body = text.getvalue()
    body = body[body.index("<svg"):]
    body = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style\b.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r' (?:xmlns(?::\w+)?|version|width|height)="[^"]*"', "", body[:(end := body.index(">"))]) + body[end:]
    body = body.replace("xlink:href", "href")
    body = re.sub(r'(\bid="|\bhref="#|url\(#)', rf"\g<1>{name}-", body)
    return body.replace("<svg", f'<svg role="img" aria-label="{label}"', 1).strip()
