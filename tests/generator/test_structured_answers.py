"""Answers of the trained sample that must match a regular expression."""

from __future__ import annotations

import json
import re

import pytest
from click.testing import CliRunner

from dmoe_export import Gap, Generator, RequestError
from dmoe_export.cli import main
from dmoe_export.errors import CheckError
from dmoe_export.grammar.grammar import Grammar

PROMPTS = ["what is 2 plus 3?", "what is 4 plus 4?", "what is the capital of italy?", "what is 9 minus 1?"]
REGEXES = [r"[0-9]{2} \+ [0-9] = [0-9]{2}", r"[0-9]+", r"the (capital|sum) of [a-z]+ is [a-z ]{1,20}\.", r"(?s).*",
           r"[a-z ]{20,30}[.?]", r"([0-9] \+ )*[0-9]", r"[0-9]{40}"]
OPTIONS = [{}, {"temperature": 1.0}, {"temperature": 0.8, "top_k": 4, "top_p": 0.9},
           {"acceptance": "fixed", "steps": 3}, {"acceptance": "credit"}, {"acceptance": "hierarchy", "cache": "none"},
           {"steps": 1, "schedule": "reference"}]


@pytest.fixture(scope="module")
def generator(sample_bundle):
    with Generator.open(sample_bundle.folder, backend="onnxruntime", threads=1) as opened:
        yield opened


def check(regex, answer, budget):
    if regex == r"[0-9]{40}":
        assert answer.finish_reason == "length" and len(answer.token_ids) == budget
        assert re.fullmatch(r"[0-9]{1,39}", answer.text)
    else:
        assert answer.finish_reason == "eos" and re.fullmatch(regex, answer.text)


@pytest.mark.parametrize("regex", REGEXES)
def test_every_answer_matches_and_a_batch_is_as_each_alone(generator, regex):
    for number, options in enumerate(OPTIONS):
        answers = generator.generate(PROMPTS, max_new_tokens=24, regex=regex, seed=number, **options)
        for i, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True)):
            check(regex, answer, 24)
            if number < 3 and i == number + 1:
                again = generator.generate(prompt, max_new_tokens=24, regex=regex, seed=number + i, **options)[0]
                assert (again.token_ids, again.text) == (answer.token_ids, answer.text)


def test_what_matches_anyway_stays_as_it_is(generator):
    plain = generator.generate(PROMPTS[0], max_new_tokens=32)[0]
    bound = generator.generate(PROMPTS[0], max_new_tokens=32, regex=r"[0-9] \+ [0-9] = (5|6)")[0]
    assert plain.text == bound.text == "2 + 3 = 5" and bound.stats.constrained_tokens == 0
    assert plain.stats.constrained_tokens is None and "grammar_seconds" not in plain.stats.as_dict()
    assert 0 < bound.stats.as_dict()["grammar_seconds"] < 5


def test_rows_with_and_without_share_a_batch(generator):
    batch, texts = generator.batch(2), {}
    bound = batch.add(generator.request(PROMPTS[0], max_new_tokens=24, regex=r"[0-9]{3}"))
    batch.add(generator.request(PROMPTS[1], max_new_tokens=24))
    while len(batch):
        for event in batch.step():
            texts[event.handle] = texts.get(event.handle, "") + event.block.text
    assert re.fullmatch(r"[0-9]{3}", texts.pop(bound)) and list(texts.values()) == ["4 + 4 = 8"]


def test_gaps_of_a_template_are_filled_so_that_the_whole_matches(generator):
    answer = generator.generate(PROMPTS[0], template=["the answer is ", Gap(4)], regex=r"the answer is( [0-9])+")[0]
    assert answer.finish_reason == "eos" and re.fullmatch(r"the answer is( [0-9])+", answer.text)
    with pytest.raises(RequestError, match=r"^No filling of the template's gaps in \d+ tokens matches regex; change"):
        generator.generate(PROMPTS[0], template=["the answer is ", Gap(4)], regex=r"[0-9]+")


def test_a_regular_expression_is_compiled_once(generator, monkeypatch):
    generator.generate(PROMPTS[0], max_new_tokens=8, regex="[0-9]{2}")
    monkeypatch.setattr("dmoe_export.grammar.grammar.automaton_of", None)
    assert generator.generate(PROMPTS[0], max_new_tokens=8, regex="[0-9]{2}")[0].finish_reason == "eos"


def test_an_answer_that_does_not_match_after_all_is_an_error(generator, monkeypatch):
    def wrong(self, text):
        raise CheckError(f"not {text}")

    monkeypatch.setattr(Grammar, "check", wrong)
    with pytest.raises(CheckError, match=r"^not [0-9]{2}$"):
        generator.generate(PROMPTS[0], max_new_tokens=8, regex="[0-9]{2}")
    assert generator.generate(PROMPTS[0], max_new_tokens=8, regex="[0-9]{20}")[0].finish_reason == "length"


def test_what_cannot_be_is_refused_when_it_is_asked_for(generator, sample_bundle, tmp_path):
    for regex, why in (("(a", "outlines-core takes"), ("ß", "No answer in 128 tokens matches regex")):
        with pytest.raises(RequestError, match=why):
            generator.request(PROMPTS[0], regex=regex)
    other = Generator(sample_bundle, generator.backend)  # not closed, as the backend is not its own
    other.text = other._grammars = None
    with pytest.raises(RequestError, match=r"^regex needs the texts of tokens, and the bundle has no tokenizer"):
        other.request([1, 2], regex="a")


def test_the_command_line(sample_bundle):
    result = CliRunner().invoke(main, ["generate", str(sample_bundle.folder), "--prompt", PROMPTS[0], "--regex",
                                       "[0-9]{3}", "--max-new-tokens", "16", "--threads", "1", "--json"])
    said = json.loads(result.output)
    assert re.fullmatch("[0-9]{3}", said["text"]) and said["finish_reason"] == "eos"


def test_under_an_expert_budget_everything_is_the_same(generator, sample_bundle):
    """Gaps, probabilities and matches: the budget moves experts, and no bit."""
    asked = {"max_new_tokens": 24, "regex": REGEXES[4], "logprobs": 2}
    parts = ["what is ", Gap(3), " plus 3?"]
    with Generator.open(sample_bundle.folder, backend="onnxruntime", threads=1, expert_budget="25%") as tight:
        for one, other in zip(generator.generate(PROMPTS, **asked), tight.generate(PROMPTS, **asked), strict=True):
            assert (one.token_ids, one.probabilities) == (other.token_ids, other.probabilities)
            assert other.stats.residency and other.stats.residency["peak_bytes"] > 0
        one, other = (each.infill(parts, logprobs=1)[0] for each in (generator, tight))
        assert (one.text, one.gaps, one.answer.probabilities) == (other.text, other.gaps, other.answer.probabilities)
