"""bench decode: every setting against the uncached one, over the same prompts."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from conftest import SAMPLE

from dmoe_export.bench.decode import Question, run, settings
from dmoe_export.cli import main
from dmoe_export.errors import RequestError
from dmoe_export.generator import Generator

COMMON = {"max_new_tokens": 32}


@pytest.fixture(scope="module")
def generator(sample_bundle):
    return Generator.open(sample_bundle.folder, backend="onnxruntime")


def test_settings_are_every_combination():
    chosen = settings(["none", "block"], ["threshold:0.9", "fixed"], ["off", "0.99"], ["merged", "reference"], COMMON)
    assert len(chosen) == 16
    assert chosen[0].options == {"max_new_tokens": 32, "cache": "none", "schedule": "merged",
                                 "acceptance": "threshold", "threshold": 0.9}
    assert chosen[-1].options["salient_threshold"] == 0.99 and chosen[-1].options["acceptance"] == "fixed"


@pytest.mark.parametrize("acceptance, salient", [("threshold:x", "off"), ("nothing:1", "off"), ("fixed", "much")])
def test_settings_that_mean_nothing(acceptance, salient):
    with pytest.raises(RequestError):
        settings(["none"], [acceptance], [salient], ["merged"], COMMON)


def test_block_cache_agrees_with_none_and_needs_other_forwards(generator):
    row = json.loads((SAMPLE / "held_out.jsonl").read_text().splitlines()[0])
    questions = [Question(row["question"], row["answer"]), Question("what is the capital of france?", "not this")]
    heard = []
    chosen = settings(["none", "block", "prefix"], ["threshold"], ["off"], ["merged", "reference"], COMMON)
    result = run(generator, questions, [*chosen[:1], *chosen[2:5]], 2, heard.append)
    none, block, reference, prefix = result.results
    assert block.agreement == block.same_answers == 1 and block.tokens == none.tokens > 0
    assert none.speedup == 1 and block.speedup == pytest.approx(none.seconds / block.seconds)
    assert block.accuracy == none.accuracy == 0.5
    assert prefix.refused and not prefix.tokens
    assert len(heard) == 3 * (2 * 2 + 1)
    assert block.forwards == reference.forwards == reference.executed_forwards > block.executed_forwards
    assert block.as_reference == 1 and block.over_reference and reference.over_reference is None
    assert block.unique_experts > 1 and block.tokens_per_forward == pytest.approx(
        block.tokens / (block.forwards * len(questions)))


def test_all_refused_is_an_error(generator):
    with pytest.raises(RequestError, match="No setting of this comparison fits"):
        run(generator, [Question("hello")], settings(["prefix", "dual"], ["threshold"], ["off"], ["merged"], COMMON), 1)


def test_command_writes_json_and_plot(sample_bundle, tmp_path):
    questions = tmp_path / "q.jsonl"
    lines = (SAMPLE / "held_out.jsonl").read_text().splitlines()
    questions.write_text("\n".join(lines))
    out, plot = tmp_path / "new" / "x.json", tmp_path / "x.png"
    done = CliRunner().invoke(main, [
        "bench", "decode", str(sample_bundle.folder), "--cache", "none,block", "--acceptance", "threshold,factor:1",
        "--prompts-file", str(questions), "--limit", "4", "--max-new-tokens", "32", "--rounds", "1", "--out", str(out),
        "--plot", str(plot), "--json"])
    assert done.exit_code == 0, done.output
    document = json.loads(out.read_text())
    assert document == json.loads(done.output)
    assert document["prompts"] == 4 and len(document["results"]) == 4
    assert {r["accuracy"] for r in document["results"] if r["acceptance"] == "threshold"} == {1.0}
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_command_shows_a_table(sample_bundle):
    done = CliRunner().invoke(main, ["bench", "decode", str(sample_bundle.folder), "--cache", "block,dual",
                                     "--random-prompt", "9", "--max-new-tokens", "32", "--rounds", "1"])
    assert done.exit_code == 0, done.output
    assert "threshold" in done.output and "dual · threshold:0.9 · salient off: Cache dual is" in done.output


@pytest.mark.parametrize("arguments, sentence", [
    (["--prompts-file", "absent.jsonl"], "cannot be read"),
    (["--prompt", "x", "--random-prompt", "3"], "Give one of"),
])
def test_command_bad_input(sample_bundle, arguments, sentence):
    done = CliRunner().invoke(main, ["bench", "decode", str(sample_bundle.folder), *arguments])
    assert done.exit_code == 2 and sentence in done.output
