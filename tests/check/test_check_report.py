"""The HTML report: well formed, self-contained, safe against what models say, and right about pass and fail."""

from __future__ import annotations

import importlib
import math
import re
import shutil
import sys
from html.parser import HTMLParser
from urllib.parse import unquote

import check_reports as given_by
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dmoe_export.check
from dmoe_export.check import plots
from dmoe_export.check.answers import MOST_GENERATIONS, SHOWN_TEXT, compared
from dmoe_export.check.digest import key_numbers
from dmoe_export.check.report import render_report, write_report
from dmoe_export.check.result import ConfidencePoint, Gate
from dmoe_export.errors import MissingRequirementError, OutputError

VOID = {"meta", "link", "br", "img", "input", "hr"}
BROKEN = given_by.error(0.01).model_copy(update={"cosine_worst": math.nan, "norm_ratio_low": math.nan,
                                                 "norm_ratio_high": math.inf, "max_abs": math.inf})


def broken_backend():
    layers = [given_by.layer(at, 0.0).model_copy(update={"update": BROKEN, "passed": False} if at == 2 else {})
              for at in range(4)]
    return given_by.backend(4, layers_alone=layers, logits=BROKEN, confidence=[
        ConfidencePoint(reference=math.nan, backend=0.5, same_token=False)])


REPORTS = {
    "passing": given_by.report,
    "failing": given_by.failing,
    "no backends, no engines": lambda: given_by.report(backends=[], engines=[]),
    "dense": lambda: given_by.report(backends=[given_by.backend(router=False, generations=[given_by.generation(
        ).model_copy(update={"reference_unique_experts": [], "backend_unique_experts": []})])], experts_exercised={}),
    "few layers": lambda: given_by.report(layers_checked=2, backends=[given_by.backend(2, generations=[])]),
    "not a number": lambda: given_by.report(backends=[broken_backend()]),
    "64 layers, two backends": lambda: given_by.report(
        layers_checked=64, layers_total=64, backends=[
            given_by.backend(64), given_by.backend(64, bad=40, layers_alone=[])]),
    "cosine 1": lambda: given_by.report(backends=[given_by.backend(
        1, layers_alone=[], layers_in_sequence=[given_by.layer(0, 0.0)], logits=given_by.error(0.0))]),
    "nothing measured": lambda: given_by.report(backends=[given_by.backend(
        layers_alone=[], layers_in_sequence=[], confidence=[], generations=[], gates=[])]),
}


class Page(HTMLParser):
    """Tags balanced, attributes, text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.tags: set[str] = set()
        self.texts: list[str] = []
        self.answers: list[str] = []
        self.answer_depth = 0
        self.feed(page)
        self.close()
        assert not self.open

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)
        if ("class", "answer") in attrs:
            self.answer_depth = len(self.open)
            self.answers.append("")

    def handle_endtag(self, tag):
        if len(self.open) == self.answer_depth:
            self.answer_depth = 0
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if self.answer_depth:
            self.answers[-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return {name: render_report(make()) for name, make in REPORTS.items()}


@pytest.mark.parametrize("name", REPORTS)
def test_every_page_is_well_formed_and_self_contained(pages, name):
    page = Page(pages[name])
    assert not page.tags & {"script", "img", "iframe", "object", "embed", "base", "form"}
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for tag, attribute, value in page.attributes:
        assert not attribute.startswith("on") and attribute not in ("src", "srcset", "xlink:href")
        if attribute == "href":
            assert value == "data:," if tag == "link" else value[0] == "#" and value[1:] in ids
    assert set(re.findall(r"url\(#?([^)]*)\)", pages[name])) <= set(ids)
    assert "://" not in pages[name] and "@import" not in pages[name]
    assert "{{" not in pages[name] and "{%" not in pages[name]


def test_passing_and_failing_pages_say_so(pages):
    passing, failing = Page(pages["passing"]).text, Page(pages["failing"]).text
    assert "✓ PASSED" in passing and "FAILED" not in passing and "✗" not in passing
    assert given_by.report().verdict in passing
    assert "✗ FAILED" in failing and "PASSED" not in failing and "First bad layer: 3" in failing
    assert "layer 3 expert 5 gate_up" in failing and "12 of 32 gates failed; first bad: layer 3" in failing


def test_another_checkpoint_is_said_before_the_verdict(pages):
    alarm = "This is not the checkpoint that the bundle was made from"
    failing = Page(pages["failing"]).text
    assert failing.index(alarm) < failing.index("✗ FAILED") < failing.index("What was checked")
    assert alarm not in pages["passing"]
    assert "2026-11-21 15:20:00 UTC" in failing


@pytest.mark.parametrize("name,figures,missing", [
    ("passing", 5, ""), ("few layers", 4, "Unique experts per"), ("dense", 3, "Router agreement per"),
    ("nothing measured", 0, "<svg"), ("64 layers, two backends", 10, "")])
def test_figures_there_is_data_for(pages, name, figures, missing):
    assert pages[name].count("<figure") == pages[name].count("<svg") == figures
    assert not missing or missing not in pages[name]


def test_no_backend_and_no_engine_are_said(pages):
    text = Page(pages["no backends, no engines"]).text
    assert "No backend ran" in text and "holds no engine file" in text


def test_numbers_that_are_none_are_named(pages):
    assert "not finite" in pages["not a number"]  # in the plots
    numbers = {what: (value, where) for what, value, where in key_numbers(broken_backend())}
    assert numbers["worst cosine alone"] == ("not a number", "least: layer 2")
    assert numbers["mean cosine of logits"][1] == "worst: not a number"


def test_a_perfect_layer_lies_on_the_floor_of_the_log_axis():
    assert "≤ 10⁻¹²" in plots.layer_error("p", given_by.backend(
        1, layers_alone=[], layers_in_sequence=[given_by.layer(0, 0.0)]))
    assert "≤" not in plots.layer_error("p", given_by.backend())


def test_plots_keep_text_as_text_and_draw_the_same_twice():
    first, again = (plots.layer_error("p", given_by.backend(bad=3)) for _ in range(2))
    assert first == again
    for words in ("alone, worst", "in sequence, mean", "first bad: 3", "layer", "10⁻²"):
        assert re.search(rf"<text[^>]*>{words}</text>", first), words


def test_gates_are_lines_in_the_colour_of_what_they_hold():
    gates = [Gate(name="norm ratio", where=f"layer 2 {how}", value=1e-3, limit=limit, comparison="at most", passed=True)
             for how, limit in (("alone", 0.02), ("in sequence", 0.1))]

    def dotted(backend):
        return [re.search(r"stroke: (#\w+)", style)[1] for style in
                re.findall(r'style="([^"]*dasharray: 2.25[^"]*)"', plots.norm_ratio("p", backend))]

    assert dotted(given_by.backend(gates=[])) == []
    assert dotted(given_by.backend(gates=gates)) == [plots.REFERENCE] * 2 + [plots.BACKEND] * 2  # 1 ± limit


def test_a_router_gate_is_a_line_too():
    gate = Gate(name="share of tokens with equal experts", where="layer 2 in sequence, router", value=1, limit=0.8,
                comparison="at least", passed=True)
    assert ">80 %<" in plots.router_agreement("p", given_by.backend(gates=[gate]))  # the axis reaches down to it
    assert ">80 %<" not in plots.router_agreement("p", given_by.backend(gates=[]))


def test_infinity_as_the_comparison_writes_it_is_not_drawn_as_a_number():
    far = given_by.error(2.0).model_copy(update={"norm_ratio_high": 1e30, "max_abs": 1e30})
    layers = [given_by.layer(0, 0.0), given_by.layer(1, 0.0).model_copy(update={"update": far, "passed": False})]
    assert "not finite" in plots.norm_ratio("p", given_by.backend(2, layers_alone=layers))
    assert "infinite" in render_report(given_by.report(backends=[given_by.backend(2, layers_alone=layers)]))


def test_many_positions_are_thinned_but_all_that_differ_stay():
    points = [ConfidencePoint(reference=at / 9999, backend=at / 9999, same_token=at % 100 > 0) for at in range(10_000)]
    assert plots.confidence("p", points).count("<use") < plots.MOST_POINTS + 200
    assert "10000 positions; 100 with" in plots.confidence("p", points)
    assert plots.confidence("p", []) is None


def test_many_generations_are_capped_and_the_different_come_first():
    generations = [given_by.generation(f"prompt {at}", 3 if at == 39 else None) for at in range(40)]
    text = Page(render_report(given_by.report(backends=[given_by.backend(generations=generations)]))).text
    assert text.count("forwards: reference") == MOST_GENERATIONS
    assert "28 more prompts not shown: 28 the same, 0 different" in text
    assert text.index("prompt 39") < text.index("prompt 0")


def test_no_line_goes_through_two_points_of_a_report():
    for layers, wanted in ((2, False), (3, True)):
        said = given_by.backend(layers, generations=[], router=False)
        lines = re.findall(r'<path d="M[^"]*L[^"]*"[^>]*style="fill: none; stroke: #0b5cad; stroke-width: 1.5; '
                           r'stroke-linecap: square"', plots.layer_error("p", said))
        assert bool(lines) == wanted


def test_red_crosses_are_told():
    assert ">failed</text>" in plots.layer_error("p", given_by.backend(bad=3))
    assert ">failed</text>" not in plots.layer_error("p", given_by.backend())


def test_files_of_the_bundle_are_links_and_numbers_stay_whole(tmp_path):
    """Relative ones, from where the report lies, also for names that a browser would take for something else."""
    folder = tmp_path / "bundles" / "javascript:alert(1) & more"
    folder.mkdir(parents=True)
    for name in ("denoiser.onnx", "denoiser-rtx.engine"):
        (folder / name).touch()
    target = tmp_path / "reports" / "r.html"
    write_report(given_by.failing().model_copy(update={"bundle": str(folder)}), target)
    page = Page(target.read_text("utf-8"))
    links = {value for tag, name, value in page.attributes if (tag, name) == ("a", "href") and value[0] != "#"}
    assert {(target.parent / unquote(link)).resolve() for link in links} == {
        folder, folder / "denoiser.onnx", folder / "denoiser-rtx.engine"}
    assert all(":" not in link and not link.startswith("/") for link in links)
    assert '<span class="whole">2026-11-21 15:20:00 UTC</span>' in target.read_text("utf-8")
    shutil.rmtree(folder)
    write_report(given_by.failing().model_copy(update={"bundle": str(folder)}), target)  # and nothing dangles
    assert all(value[0] == "#" for tag, name, value in Page(target.read_text("utf-8")).attributes if (
        tag, name) == ("a", "href"))


HOSTILE = "</span></main><script>alert(1)</script><img src=x onerror=alert(2)> {{ 7*7 }} &amp; \x00\x1b[31m\u202e"


def page_of(**generation) -> str:
    said = given_by.generation().model_copy(update={"reference_unique_experts": [], "backend_unique_experts": [],
                                                    **generation})
    return render_report(given_by.report(backends=[given_by.backend(
        layers_alone=[], layers_in_sequence=[], confidence=[], generations=[said])]))


def test_what_a_model_says_is_shown_and_not_obeyed():
    page = Page(page_of(prompt=HOSTILE, first_difference=0, reference_text=HOSTILE, backend_text="fine " + HOSTILE))
    assert not page.tags & {"script", "img"}
    seen = HOSTILE.replace("\x00", "␀").replace("\x1b", "␛")
    assert page.answers == [seen, "fine " + seen]
    assert page.text.count("<script>alert(1)</script>") == 3


@given(st.text(max_size=60), st.text(max_size=60))
def test_both_answers_can_be_read_back(left, right):
    page = Page(page_of(first_difference=None if left == right else 0, reference_text=left, backend_text=right))
    pictures = {c: 0x2400 + c for c in range(32) if c not in (9, 10)} | {127: 0x2421}
    wanted = [left] if left == right else [left, right]
    assert [answer.removesuffix("(ends here)") for answer in page.answers] == [
        text.removesuffix("(ends here)").translate(pictures) for text in wanted]


@given(st.text("ab c\n", max_size=40), st.text("ab c\n", max_size=40))
def test_the_marks_stand_where_the_texts_part(left, right):
    sides = compared(given_by.generation(first_difference=0, reference=left, backend=right))
    if left == right:
        assert sides[0].mark == "100" and sides[1].mark == "900"  # equal texts of different tokens: ids
        return
    assert sides[0].before == sides[1].before
    assert (sides[0].mark, sides[0].after) != (sides[1].mark, sides[1].after)


def test_long_answers_are_cut_around_the_difference():
    same, other = "word " * 500 + "left " + "tail " * 500, "word " * 500 + "right " + "tail " * 500
    left, right = compared(given_by.generation(first_difference=20, reference=same, backend=other))
    assert (left.mark, right.mark) == ("left", "right")
    assert left.before.startswith(f"… ({2500 - SHOWN_TEXT:,} characters) …")
    assert len(left.before) < SHOWN_TEXT + 40 and left.after.endswith("more characters)")


def test_ids_stand_in_for_text_and_an_end_is_marked():
    said = given_by.generation(None, 2, None).model_copy(update={"backend_ids": [100, 101]})
    left, right = compared(said)
    assert (left.before, left.mark) == ("100 101 ", "102") and left.after.startswith(" 103 104")
    assert (right.before, right.mark, right.after) == ("100 101 ", "(ends here)", "")


def test_the_file_is_put_in_place_whole(tmp_path):
    target = tmp_path / "new" / "report.html"
    write_report(given_by.report(backends=[]), target)
    write_report(given_by.report(backends=[], verdict="half a pair \ud800 from a model"), target)
    assert "half a pair ? from" in target.read_text("utf-8")
    assert [p.name for p in target.parent.iterdir()] == ["report.html"]
    assert target.stat().st_mode & 0o777 == 0o644


def test_what_cannot_be_written_is_said_and_nothing_stays(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for target in (tmp_path / "file" / "report.html", tmp_path / "folder"):
        with pytest.raises(OutputError, match=re.escape(str(target))) as caught:
            write_report(given_by.report(backends=[]), target)
        assert caught.value.exit_code == 2
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder"]


def test_without_matplotlib_the_fix_is_named_before_anything_is_checked(monkeypatch):
    monkeypatch.delattr(dmoe_export.check, "plots")
    for name in ("plots", "report"):
        monkeypatch.delitem(sys.modules, f"dmoe_export.check.{name}")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingRequirementError, match=re.escape("draws with matplotlib")) as caught:
        importlib.import_module("dmoe_export.check.report")
    assert caught.value.exit_code == 3
