"""`generate --infill` and `--template`: gaps written down, filled, shown."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from dmoe_export import Gap, Generator
from dmoe_export.cli import main
from dmoe_export.decoding.gap_marks import parts_of
from dmoe_export.errors import RequestError

TEXT = "tom has <gap:1> apples and buys 7 more. 12 + 7 = <gap:1> apples"


@pytest.mark.parametrize("text, parts", [
    ("<gap:8>", [Gap(8)]),
    ("a <gap:2-8>b", ["a ", Gap(2, 8), "b"]),
    ("<gap:1><gap:2>\n", [Gap(1), Gap(2), "\n"]),
    ("<<gap:8> <gap:8>", ["<gap:8> ", Gap(8)]),
    ("<<<gap: and <gap:3>>", ["<<gap: and ", Gap(3), ">"]),
    ("if a < gap: <gap:1> <gap >", ["if a < gap: ", Gap(1), " <gap >"])])
def test_marks(text, parts):
    assert parts_of(text) == parts


@pytest.mark.parametrize("text, words", [
    ("a <gap:x> b", "'<gap:x> b' is no gap; write <gap:8>"), ("<gap:>", "'<gap:>' is no gap"), ("<gap:8", "is no gap"),
    ("<gap:٣>", "is no gap"), ("<gap:2-8-9>", "is no gap"), ("<gap:9999999999>", "is no gap"),
    ("<gap:-1>", "is no gap"),
    ("", "'' has no gap that could be filled"), ("<<gap:8>", "has no gap that could be filled"),
    ("<gap:0>", "makes no sense"), ("<gap:8-2>", "makes no sense")])
def test_marks_that_are_none(text, words):
    with pytest.raises(RequestError, match=words):
        parts_of(text)


def run(bundle, *options):
    return CliRunner().invoke(main, ["generate", str(bundle.folder), "--threads", "1", "--verify", "sizes", *options])


@pytest.fixture(scope="module")
def infilling(sample_bundle):
    with Generator.open(sample_bundle.folder, threads=1, verify="sizes") as generator:
        yield generator.infill(parts_of(TEXT))[0]


def test_the_whole_text_is_printed(sample_bundle, infilling):
    result = run(sample_bundle, "--infill", TEXT)
    assert result.stdout == f"{infilling.text}\n" and result.stdout.startswith("tom has ")
    assert result.stderr.startswith(f"[{infilling.answer.finish_reason}: ")


def test_json_says_what_is_in_each_gap(sample_bundle, infilling):
    said = json.loads(run(sample_bundle, "--infill", TEXT, "--json").stdout)
    assert said["gaps"] == infilling.as_dict()["gaps"] and said["text"] == infilling.text
    assert said["answer"]["token_ids"] == infilling.answer.token_ids and said["backend"]["name"] == "onnxruntime"


def test_watched_gaps(sample_bundle, infilling):
    result = run(sample_bundle, "--infill", TEXT, "--watch")
    assert result.stdout == f"{infilling.text}\n"
    assert [line for line in result.stderr.splitlines() if line.startswith("block ")]


@pytest.mark.parametrize("more", [(), ("--stream",), ("--watch",)])
def test_a_template_is_what_the_answer_is_made_of(sample_bundle, more):
    result = run(sample_bundle, "--prompt", "what is 2 plus 3?", "--template", "2 + 3 = <gap:1>", *more)
    assert result.exit_code == 0 and result.stdout == "2 + 3 = 5\n"


@pytest.mark.parametrize("options, words", [
    (("--infill", TEXT, "--stream"), "once all its gaps are filled; leave --stream out."),
    (("--infill", TEXT, "--template", TEXT), "leave --template out."),
    (("--infill", TEXT, "--template-kwarg", "a=1"), "leave --template-kwarg out."),
    (("--infill", TEXT, "--prompt", "a"), "Give exactly one of --prompt, --prompt-file, --prompt-ids, --infill."),
    (("--prompt", "a", "--template", "b"), "'b' has no gap that could be filled"),
    (("--infill", "a <gap:2-8>"), "insert_delete")])
def test_refusals(sample_bundle, options, words):
    result = run(sample_bundle, *options)
    assert result.exit_code == 2 and words in result.stderr and result.stdout == ""
