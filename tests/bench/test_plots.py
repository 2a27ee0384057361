"""Every plot of a benchmark, drawn from the stored results: axes named, colours told, no line through two points."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib.colors import to_hex
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from dmoe_export import drawing
from dmoe_export.bench import plots, plots_generate, plots_step
from dmoe_export.bench.decode import DecodeBench
from dmoe_export.bench.generate import GenerateBench
from dmoe_export.bench.residency import ResidencyBench
from dmoe_export.bench.step import StepBench

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
PLOTS = [(plots_step, plots_step.plot_step, StepBench, "bench_step"),
         (plots_generate, plots_generate.plot_generate, GenerateBench, "bench_generate"),
         (plots, plots.plot_decode, DecodeBench, "decode_dense_llada_8x1024"),
         (plots, plots.plot_decode, DecodeBench, "decode_sample"),
         (plots, plots.plot_residency, ResidencyBench, "residency_mini_exact_quiet")]


def stored(kind, name):
    """Results of before a field was added have its default, or null."""
    found = json.loads((RESULTS / f"{name}_2core_cpu_2026-11-21.json").read_text())
    return kind.model_validate({field: found.get(field) for field in kind.model_fields})


@pytest.fixture(params=PLOTS, ids=[name for *_, name in PLOTS])
def figure(request, monkeypatch, tmp_path):
    module, plot, kind, name = request.param
    kept = []
    monkeypatch.setattr(module, "save", lambda figure, path: kept.append(figure))
    plot(stored(kind, name), tmp_path / "x.png")
    return kept[0]


def _told(figure):
    """Colours of all legends."""
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
    handles = [handle for legend in legends for handle in legend.legend_handles]
    assert all(text.get_text() for legend in legends for text in legend.get_texts())
    return {to_hex(colour) for handle in handles for colour in (
        (handle.get_facecolor(), handle.get_edgecolor()) if isinstance(handle, Patch) else (handle.get_color(),))}


def _lines(axes):
    """Lines of data that are seen; not those across the whole panel."""
    return [line for line in axes.lines if line.get_transform() == axes.transData
            and {line.get_linestyle(), line.get_marker()} != {"None"}]


def test_axes_are_named_with_units(figure):
    assert figure.get_suptitle()
    for axes in figure.axes:
        assert axes.get_xlabel()
        assert axes.get_ylabel() or axes.get_shared_y_axes().joined(axes, figure.axes[0])
    names = " ".join(axes.get_xlabel() + axes.get_ylabel() for axes in figure.axes)
    assert any(unit in names for unit in ("per second", "ms"))


def test_every_colour_is_told(figure):
    told = _told(figure)
    for axes in figure.axes:
        drawn = {to_hex(bar.get_edgecolor() if bar.get_hatch() else bar.get_facecolor()) for bar in axes.patches
                 if isinstance(bar, Rectangle) and bar.get_width() and bar.get_height()}
        drawn |= {to_hex(line.get_color() if line.get_linestyle() != "None" else line.get_markeredgecolor())
                  for line in _lines(axes)}
        assert drawn and drawn <= told | {drawing.INK}
        assert drawn <= set(drawing.COLOURS) | {drawing.INK}


def test_no_line_goes_through_two_points(figure):
    for axes in figure.axes:
        for line in _lines(axes):
            assert line.get_linestyle() == "None" or len(np.unique(line.get_xdata())) > 2


def test_lines_need_three_points():
    assert [drawing.line_through(range(n), "-") for n in range(5)] == ["", "", "", "-", "-"]
    assert Line2D([], [], linestyle=drawing.line_through([1], "-")).get_linestyle() == "None"


def test_numbers_at_bars():
    shown = {0.12345: "0.123", 12.0: "12", 999.4: "999", 1219.6: "1,220", 0.0: "0"}
    assert {value: drawing.number(value) for value in shown} == shown


def test_colours_can_be_told_apart_in_grey_or_by_marker():
    """No two of the first colours have both the same lightness and the same marker."""
    assert len(set(drawing.COLOURS)) == len(drawing.COLOURS) == len(drawing.MARKERS) == len(set(drawing.MARKERS))
