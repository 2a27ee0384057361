"""`Generator.score` on the sample: what choices may be, what comes back, and right answers beside wrong ones."""

from __future__ import annotations

import inspect
import json
import re
import threading
import time
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import SAMPLE
from ending_helpers import QUESTION, Slow, in_thread, of_the_sample, that_waits  # noqa: F401 - fixtures

from dmoe_export import Generator, RequestError, Score, ScoreOptions
from dmoe_export.cli import main
from dmoe_export.cli.score import score as verb
from dmoe_export.decoding.score_settings import SCORE_OPTIONS, ScoreSettings
from dmoe_export.runtime.backend import ForwardInputs
from dmoe_export.scoring import Scoring

RIGHT, WRONG = "2 + 3 = 5", "2 + 3 = 6"


def by_hand(generator, prompt, choice):
    """ln p of each token in one pass, block by block, without a cache."""
    n, d, text = generator.backend.routing.block_length, generator.backend.description, [*prompt, *choice]
    found = []
    for start in range(len(prompt) // n * n, len(text), n):
        row = np.full(start + n, d.mask_id)
        known = max(start, len(prompt))
        row[:known] = text[:known]
        places = np.arange(known, min(start + n, len(text)))
        out = generator.backend.forward(ForwardInputs(row[None], np.arange(start + n)[None], places[None], {},
                                                      want_logits=True), generator.backend.new_cache(1))
        x = np.delete(out.logits[0].astype(np.float64), d.mask_id, axis=1)
        tokens = np.array(text)[places]
        found += (x[np.arange(len(places)), tokens - (tokens > d.mask_id)] - np.log(np.exp(x).sum(axis=1))).tolist()
    return found


def test_scores_are_those_of_forwards_by_hand(generator):
    """A prompt of 50 tokens: a block before the one in which the choice begins, and the choice ends in the third."""
    prompt, choice = generator.text.encode_plain(f"{QUESTION} " * 9)[:50], generator.text.encode_plain(RIGHT) * 4
    (one,) = generator.score(prompt, [choice])
    assert len(prompt) == 50 and one.tokens == len(choice) == 20
    assert one.token_log_probabilities == pytest.approx(by_hand(generator, prompt, choice), abs=1e-3)
    assert one.log_probability == pytest.approx(sum(one.token_log_probabilities)) and one.forwards == 4


def test_right_answers_beat_wrong_ones_under_both_estimators(generator):
    """Of other questions of the task, the nearest in length."""
    rows = [json.loads(line) for line in (SAMPLE / "held_out.jsonl").read_text().splitlines()][::50]
    questions = []
    for row in rows:
        others = [other["answer"] for other in rows if other["answer"] != row["answer"]]
        near = sorted(others, key=lambda other, row=row: abs(len(other) - len(row["answer"])))[:2]
        questions.append((row["question"], [near[0], row["answer"], near[1]]))
    for options in ({}, {"estimator": "monte_carlo", "samples": 8}, {"end": True, "batch": 3}):
        for scores in generator.score_all(questions, **options):
            assert np.argmax([one.log_probability for one in scores]) == 1 and len(scores) == 3
            assert [one.is_greedy for one in scores] == [False, True, False]


def test_a_choice_is_text_or_ids_and_may_end(generator):
    text, ids, ended = (generator.score(QUESTION, [choice], end=end)[0] for choice, end in (
        (RIGHT, False), (generator.text.encode_literal(RIGHT), False), (RIGHT, True)))
    assert text == ids and isinstance(text, Score)
    assert ended.token_ids == [*text.token_ids, generator.backend.description.eos_id]
    early = generator.score(QUESTION, ["2 + 3 ="], end=True)[0]
    assert ended.log_probability > -0.1 and early.log_probability < -5  # it would not end there
    literal = generator.score(QUESTION, ["<|endoftext|>"])[0]
    assert generator.backend.description.eos_id not in literal.token_ids


def test_neighbours_batches_and_budgets_change_no_bit(sample_bundle, our_kernels):
    """With our kernels, which sum in one order whatever is beside a token."""
    with Generator.open(sample_bundle.folder, backend="onnxruntime", threads=1, verify="sizes") as generator:
        for options in ({}, {"estimator": "monte_carlo", "samples": 3}):
            alone = [generator.score(QUESTION, [choice], batch=1, **options)[0] for choice in (RIGHT, WRONG, "paris")]
            _, beside = generator.score_all([("what is the capital of france?", ["paris"] * 6),
                                             (QUESTION, [RIGHT, WRONG, "paris"])], batch=5, **options)
            assert [one.log_probability for one in alone] == [one.log_probability for one in beside]
            with Generator.open(sample_bundle.folder, threads=1, expert_budget="25%", verify="sizes") as small:
                assert small.score(QUESTION, [RIGHT, WRONG, "paris"], **options) == generator.score(
                    QUESTION, [RIGHT, WRONG, "paris"], **options)
                assert small.backend.statistics().misses > 0


@pytest.mark.parametrize(("choices", "options", "sentence"), [
    ("yes", {}, "The choices are 'yes', they must be a list of texts or of lists of token ids, such as "
     '["yes", "no"].'),
    ([], {}, "No choice was given; give at least one."),
    ([5, 6], {}, "A choice is 5, it must be text or a list of token ids."),
    ([[5, 0.5]], {}, "A token id of a choice is 0.5, it must be an integer."),
    (["yes", ""], {}, "Choice 1 of prompt 0 is empty; give at least one token."),
    (["yes"], {"speed": 1}, "Unknown scoring option: speed."),
    (["yes"], {"samples": 0}, "samples is 0, it must be between 1 and 65536."),
    (["yes"], {"estimator": "best"}, "estimator is best, it must be one_pass or monte_carlo."),
    (["yes"], {"coreset_size": 8}, "coreset_size has no meaning in this bundle: its routing mode is top_p."),
    (["yes"], {"cancel": 1}, "cancel is 1, it must be a threading.Event."),
], ids=lambda value: value.split()[0] if isinstance(value, str) else "")
def test_what_makes_no_sense_is_refused(generator, choices, options, sentence):
    with pytest.raises(RequestError) as refused:
        generator.score(QUESTION, choices, **options)
    assert str(refused.value) == sentence


def test_routing_is_an_option_and_the_preset_s(generator, monkeypatch):
    few, all_of_them = (generator.score(QUESTION, [WRONG], coreset_top_p=p)[0].log_probability for p in (0.1, 1.0))
    assert few != all_of_them
    monkeypatch.setattr(generator.defaults, "_values", {"coreset_top_p": 0.1, "max_new_tokens": 7})
    assert generator.score(QUESTION, [WRONG])[0].log_probability == few
    assert generator.score(QUESTION, [WRONG], coreset_top_p=1.0)[0].log_probability == all_of_them


def test_another_thread_cancels_between_forwards(slow):
    cancel = threading.Event()
    join = in_thread(lambda: slow.score(QUESTION, [RIGHT, WRONG], batch=1, cancel=cancel))
    assert slow.backend.began.wait(60)
    cancel.set()
    slow.backend.turns.release()
    with pytest.raises(RequestError, match=r"^Scoring was cancelled before all choices had their scores"):
        join()
    assert slow.backend.forwards == 1


def test_closing_ends_it(sample_bundle):
    with Generator.open(sample_bundle.folder, threads=1, verify="sizes") as generator:
        waits = Generator(generator.bundle, Slow(generator.backend))
        join = in_thread(lambda: waits.score(QUESTION, [RIGHT, WRONG], batch=1))
        assert waits.backend.began.wait(60)
        closing = in_thread(waits.close)
        while not waits._life.over:
            time.sleep(0.01)
        waits.backend.turns.release(1000)
        closing()
        for call in (join, lambda: waits.score(QUESTION, [RIGHT])):
            with pytest.raises(RequestError, match=r"^The generator of .* was closed; open the bundle again\.$"):
                call()
        assert waits.backend.forwards == 1


def test_options_are_told_once():
    fields, keys = get_type_hints(ScoreSettings), get_type_hints(ScoreOptions)
    assert keys == {name: hint | None for name, hint in fields.items()}
    said = " ".join(inspect.getdoc(Scoring.score).split())
    assert said.endswith("left out or None: " + " ".join(f"{name}: {one.help}" for name, one in SCORE_OPTIONS.items()))
    shown = {param.name: getattr(param, "help", None) for param in verb.params}
    assert {name: shown[name] for name in SCORE_OPTIONS} == {name: one.help for name, one in SCORE_OPTIONS.items()}
    page = (Path(__file__).parents[2] / "docs" / "scoring.md").read_text(encoding="utf-8")
    for name, one in SCORE_OPTIONS.items():
        assert re.search(rf"^\| `{name}` \| `--\S.* \| (\w+, )?{one.words or 'true or false'} \| {one.shown} \| "
                         rf"{re.escape(one.told.meaning)} \|$", page, re.MULTILINE), name


def run(*words):
    return CliRunner(env={"COLUMNS": "120"}).invoke(main, ["score", *words], prog_name="dmoe-export")


def test_the_command_line_says_what_python_does(sample_bundle, generator):
    given = [str(sample_bundle.folder), "--prompt", QUESTION, "--choice", RIGHT, "--choice-ids", "8,9", "--threads",
             "1"]
    done = run(*given, "--json")
    found = json.loads(done.stdout)["scores"]
    assert found == [one.as_dict() for one in generator.score(QUESTION, [RIGHT, [8, 9]])]
    done = run(*given, "--estimator", "monte_carlo", "--samples", "2")
    rows = [line.split("│")[1:-1] for line in done.stdout.splitlines() if line.startswith("│")]
    scores = generator.score(QUESTION, [RIGHT, [8, 9]], estimator="monte_carlo", samples=2)
    assert [[cell.strip() for cell in row] for row in rows] == [
        [name, f"{one.log_probability:.3f}", f"{one.standard_error:.3f}", str(one.tokens),
         f"{one.log_probability / one.tokens:.3f}", "yes" if one.is_greedy else "no"]
        for name, one in zip((RIGHT, "8,9"), scores, strict=True)]
    assert done.stderr.startswith("[monte_carlo, 2 samples of each block, ")


@pytest.mark.parametrize(("words", "sentence"), [
    (["--choice", "a"], "Give exactly one of --prompt, --prompt-ids."),
    (["--prompt", "a", "--choice-ids", "1,b"], "--choice-ids '1,b' is no list of integers such as 1,2,3."),
    (["--prompt", "a"], "No choice was given; give at least one."),
])
def test_the_command_line_refuses(sample_bundle, words, sentence):
    done = run(str(sample_bundle.folder), *words)
    assert done.exit_code == 2 and done.stderr == f"dmoe-export: {sentence}\n"
