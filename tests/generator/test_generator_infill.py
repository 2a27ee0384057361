"""`Generator.infill` and `template`: texts with gaps in, the same texts filled out."""

from __future__ import annotations

import threading

import pytest

from dmoe_export import Gap, Generator
from dmoe_export.decoding.answer import generation_of
from dmoe_export.description import MOST_POSITIONS
from dmoe_export.errors import RequestError

QUESTION = "what is the capital of france?"
PARTS = ["the capital of ", Gap(1), " is ", Gap(1), "."]
TEXTS = [["tom has 12 apples and buys ", Gap(1), " more."], [Gap(2), " 7 = 19 apples"],
         [[145, 84], Gap(3), [13], Gap(1)]]


@pytest.fixture(scope="module")
def generator(sample_bundle):
    with Generator.open(sample_bundle.folder, threads=1, verify="sizes") as opened:
        yield opened


def test_a_chat_answer_around_given_text(generator):
    answer, = generator.generate(QUESTION, template=PARTS)
    assert answer.text == "the capital of france is paris." and answer.finish_reason == "filled"
    blocks = list(generator.stream([QUESTION, QUESTION], template=PARTS))
    for i in range(2):
        assert "".join(block.text for block in blocks if block.index == i) == answer.text
    assert generator.generate(QUESTION, template=PARTS[:-1], max_new_tokens=8)[0].finish_reason == "length"


def test_several_texts_are_filled_as_each_alone(generator):
    together = generator.infill(TEXTS)
    for parts, result in zip(TEXTS, together, strict=True):
        alone, = generator.infill(parts)
        assert (alone.text, alone.gaps) == (result.text, result.gaps)
        before = [] if isinstance(parts[0], Gap) else generator.text.encode_plain(parts[0]) if isinstance(
            parts[0], str) else parts[0]
        assert result.text == generator.text.decode([*before, *result.answer.token_ids])
        assert all(gap.text.strip() in result.text for gap in result.gaps)
    assert together[0].text.startswith("tom has 12 apples and buys") and together[0].text.endswith("more.")
    assert together[1].text.endswith("7 = 19 apples") and together[1].gaps[0].in_sight == 5
    assert together[2].gaps[0].in_sight == 1 and together[2].gaps[1].in_sight == 0


def test_a_batch_fills_texts_too(generator):
    request, batch, blocks = generator.infilling(TEXTS[0]), generator.batch(slots=1), []
    batch.add(request)
    while len(batch):
        blocks += [event.block for event in batch.step()]
    assert generator.filled(request, generation_of(blocks)).gaps == generator.infill(TEXTS[0])[0].gaps


def test_an_answer_that_was_cut_short_has_empty_gaps(generator):
    cancel = threading.Event()
    cancel.set()
    result, = generator.infill(TEXTS[0], cancel=cancel)
    assert result.text == "tom has 12 apples and buys" and result.answer.finish_reason == "cancelled"
    assert [(gap.token_ids, gap.text) for gap in result.gaps] == [([], "")]


def test_a_stop_text_may_be_given_text(generator):
    answer, = generator.generate(QUESTION, template=PARTS, stop="is")
    assert answer.text == "the capital of france " and answer.finish_reason == "stop"
    assert answer.stats.given_tokens == 4 and answer.stats.new_tokens == 5


@pytest.mark.parametrize("parts, words", [
    ("text", "A text with gaps is a list of parts"), (5, "A text with gaps is a list of parts"),
    (b"a", "A text with gaps is a list of parts"), ([], "No text with gaps was given"),
    (["a"], "The template has no gap"), ([["a", Gap(1)], ["b"]], "The template has no gap"),
    ([Gap(1), 5], "A part of the template is 5"), ([Gap(1), {"a": 1}], "A part of the template is {'a': 1}"),
    ([Gap(1), [True]], "True"), ([Gap(1), [164]], "token id 164, outside the vocabulary"),
    (["a", Gap(1), [8, -1]], "A token id of the template is -1, it must be 0 or more"),
    ([[10**6], Gap(1)], "token id 1000000, outside"),
    (["a", Gap(2, 8)], "needs a model that inserts and deletes"), ([Gap(1)], "Prompt 0 is empty"),
    (["a", Gap(MOST_POSITIONS), Gap(1)], "more than .* places, which no model takes")])
def test_refusals(generator, parts, words):
    with pytest.raises(RequestError, match=words):
        generator.infill(parts)


@pytest.mark.parametrize("template, options, words", [
    (PARTS, {"max_new_tokens": 5}, "has 7 places, more than max_new_tokens 5; leave max_new_tokens out"),
    ("a", {}, "The template is 'a', it must be a list"), (Gap(1), {}, "it must be a list"), ([], {}, "has no gap"),
    ([Gap(1), [1]], {}, "token id 1, which ends an answer"), ([Gap(1), [5]], {"eos_id": 5}, "which ends an answer")])
def test_templates_that_are_none(generator, template, options, words):
    with pytest.raises(RequestError, match=words):
        generator.generate(QUESTION, template=template, **options)


@pytest.mark.parametrize("numbers", [(0,), (-1,), (8, 2), (1.5,), ("a",), (True,), (1, 10**9)])
def test_gaps_that_are_none(numbers):
    with pytest.raises(RequestError):
        Gap(*numbers)


def test_without_a_tokenizer_parts_are_token_ids(tiny_bundle):
    with Generator.open(tiny_bundle.folder, threads=1, verify="sizes") as generator:
        result, = generator.infill([[5, 6], Gap(2), [7]], steps=2)
        assert result.text is None and result.gaps[0].text is None and len(result.gaps[0].token_ids) == 2
        for parts in (["a", Gap(1)], [[5], Gap(1), "a"]):
            with pytest.raises(RequestError, match="has no tokenizer for the text of a template; give token ids"):
                generator.infill(parts)
