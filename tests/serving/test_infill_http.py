"""Suffix, infill and templates over HTTP: what `Generator` gives offline, whole and as a stream."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from page_helpers import CHAT, ask, house_of, served

from dmoe_export.decoding.template import Gap

QUESTION = "what is 2 plus 3?"


@pytest.fixture(scope="module")
def house(sample_bundle):
    with house_of(sample_bundle) as house:
        yield house


@pytest.fixture(scope="module")
def url(house):
    with served(house) as url:
        yield url


@pytest.fixture(scope="module")
def offline(house):
    return house.models["sample"].generator


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as one:
        yield one


def over_http(parts):
    """Parts as a body has them."""
    return [part if not isinstance(part, Gap) else {"gap": part.fewest} for part in parts]


def infilled(client, parts, **more):
    return client.completions.create(model="sample", prompt=None, extra_body={"infill": over_http(parts)}, **more)


def pieces(client, **more):
    """Events of a completion's stream."""
    return list(client.completions.create(model="sample", stream=True, stream_options={"include_usage": True}, **more))


def gaps_of(choice):
    """As `Filled.as_dict`; where they stand in the text is looked at here."""
    gaps = [dict(gap) for gap in choice.model_extra["gaps"]]
    assert all(choice.text[gap.pop("text_offset"):].startswith(gap["text"]) for gap in gaps)
    return gaps


@pytest.mark.parametrize("prompt", ["what is 2 plus ", [5, 6, 7], ""], ids=["text", "ids", "none"])
def test_a_suffix_is_what_stands_behind_the_gap(client, offline, prompt):
    suffix = "? it is 5."
    wanted = offline.infill([prompt, Gap(9), suffix])[0]
    answer = client.completions.create(model="sample", prompt=prompt, suffix=suffix, max_tokens=9)
    (choice,), (gap,) = answer.choices, wanted.gaps
    assert choice.text == gap.text and choice.model_extra["token_ids"] == gap.token_ids and len(gap.token_ids) == 9
    assert choice.finish_reason == "stop" and gap.in_sight > 0
    assert choice.model_extra["gaps"] == [gap.as_dict() | {"text_offset": 0}]
    given = len(offline.infilling([prompt, Gap(9), suffix]).token_ids) + len(offline.text.encode_literal(suffix))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (given, 9)
    *events, last = pieces(client, prompt=prompt, suffix=suffix, max_tokens=9)
    assert "".join(one.choices[0].text for one in events) == gap.text and last.usage == answer.usage
    assert events[-1].choices[0].model_extra["gaps"] == choice.model_extra["gaps"]


def test_a_long_gap_streams_by_blocks_and_shows_nothing_of_the_suffix(client, offline):
    suffix = "end " * 30  # more blocks
    wanted = offline.infill([QUESTION, Gap(70), suffix])[0].gaps[0]
    *events, last = pieces(client, prompt=QUESTION, suffix=suffix, max_tokens=70)
    assert "".join(one.choices[0].text for one in events) == wanted.text and len(events) > 2
    assert [i for one in events for i in one.choices[0].model_extra["token_ids"]] == wanted.token_ids
    assert last.usage.completion_tokens == 70


def test_prompts_and_choices_with_one_suffix(client, offline):
    answer = client.completions.create(model="sample", prompt=["a ", [5, 6]], suffix=" b", max_tokens=5, n=2,
                                       temperature=0.9, seed=3)
    options = {"temperature": 0.9}
    wanted = [offline.infill([prompt, Gap(5), " b"], seed=3 + i, **options)[0].gaps[0].text
              for i, prompt in enumerate(["a ", "a ", [5, 6], [5, 6]])]
    assert [choice.text for choice in answer.choices] == wanted
    once = sum(len(offline.infilling([prompt, Gap(5), " b"]).token_ids) + len(offline.text.encode_literal(" b"))
               for prompt in ("a ", [5, 6]))
    assert answer.usage.prompt_tokens == once and answer.usage.completion_tokens == 20


def test_an_empty_suffix_is_none_and_a_gap_has_the_usual_number(client, offline):
    plain = offline.generate(QUESTION, chat=False, max_new_tokens=20)[0].text
    assert client.completions.create(model="sample", prompt=QUESTION, suffix="", max_tokens=20).choices[0].text == plain
    usual = client.completions.create(model="sample", prompt=QUESTION, suffix=".")
    assert usual.usage.completion_tokens == 128


def test_a_stop_string_is_looked_for_in_the_gap_alone(client, offline):
    prompt, suffix = "sort the list 5 2 9. it is ", " and no more."
    gap = offline.infill([prompt, Gap(12), suffix])[0].gaps[0].text
    stop = gap[2:4]
    cut = client.completions.create(model="sample", prompt=prompt, suffix=suffix, max_tokens=12, stop=[stop])
    assert cut.choices[0].text == gap[:gap.index(stop)] and cut.choices[0].finish_reason == "stop"
    whole = client.completions.create(model="sample", prompt=prompt, suffix=suffix, max_tokens=12, stop=["more"])
    assert whole.choices[0].text == gap and whole.usage.completion_tokens == 12


TEXTS = [["what is ", Gap(3), " plus 3? it is ", Gap(2), "."], [Gap(4), " is é 日本 🎉 ", Gap(40), "!", Gap(5)],
         [[5, 6], Gap(4), [7, 8], " and ", Gap(2), Gap(3), " x " * 40, Gap(6), "."]]


@pytest.mark.parametrize("parts", TEXTS, ids=["two", "unicode", "ids"])
def test_infill_is_the_whole_text_and_its_gaps(client, offline, parts):
    wanted, request = offline.infill(parts)[0], offline.infilling(parts)
    answer = infilled(client, parts)
    choice = answer.choices[0]
    assert choice.text == wanted.text and gaps_of(choice) == [gap.as_dict() for gap in wanted.gaps]
    ids = [*request.token_ids, *wanted.answer.token_ids]
    assert choice.model_extra["token_ids"] == ids
    filled = sum(len(gap.token_ids) for gap in wanted.gaps)
    assert answer.usage.completion_tokens == filled and answer.usage.total_tokens >= len(ids)
    assert choice.finish_reason in ("stop", "length")
    *events, last = pieces(client, prompt=None, extra_body={"infill": over_http(parts)})
    assert "".join(one.choices[0].text for one in events) == wanted.text and last.usage == answer.usage
    assert [i for one in events for i in one.choices[0].model_extra["token_ids"]] == ids
    assert [("gaps" in one.choices[0].model_extra) for one in events] == [False] * (len(events) - 1) + [True]


def test_an_answer_is_made_of_its_template(client, offline):
    template = ["the sum is ", Gap(3), ". it is so as ", Gap(40), "."]
    wanted = offline.generate(QUESTION, template=template)[0]
    messages, extra = [{"role": "user", "content": QUESTION}], {"template": over_http(template)}
    answer = client.chat.completions.create(model="sample", messages=messages, extra_body=extra)
    choice = answer.choices[0]
    assert choice.message.content == wanted.text and choice.finish_reason == "stop"
    assert choice.message.content.startswith("the sum is ") and choice.message.content.endswith(".")
    gaps = choice.model_extra["gaps"]
    assert [len(gap["token_ids"]) for gap in gaps] == [3, 40] and answer.usage.completion_tokens == 43
    assert all(wanted.text[gap["text_offset"]:].startswith(gap["text"]) for gap in gaps)
    assert answer.usage.total_tokens == wanted.stats.prompt_tokens + len(wanted.token_ids)
    events = list(client.chat.completions.create(model="sample", messages=messages, extra_body=extra, stream=True))
    assert "".join(one.choices[0].delta.content for one in events) == wanted.text
    assert events[-1].choices[0].model_extra["gaps"] == choice.model_extra["gaps"]
    plain = client.completions.create(model="sample", prompt=QUESTION, extra_body=extra)
    assert plain.choices[0].text == offline.generate(QUESTION, chat=False, template=template)[0].text


def test_beside_ordinary_neighbours_answers_are_the_same(client, offline):
    def ordinary(question):
        return client.chat.completions.create(model="sample", messages=[{"role": "user", "content": question}],
                                              max_tokens=32).choices[0].message.content

    asked = [QUESTION, "what is the capital of france?", "sort the list 5 2 9."]
    with ThreadPoolExecutor(6) as pool:
        texts = pool.map(lambda parts: infilled(client, parts).choices[0].text, TEXTS)
        answers = pool.map(ordinary, asked)
        assert list(texts) == [one.text for parts in TEXTS for one in offline.infill(parts)]
        assert list(answers) == [one.text for one in offline.generate(asked, max_new_tokens=32)]


def test_an_answer_that_cannot_be_read_fails_alone(url, client, offline, monkeypatch):
    def broken(*_):
        raise RuntimeError("a secret of the machine")

    monkeypatch.setattr(offline, "filled", broken)
    response = ask(f"{url}/v1/completions", {"model": "sample", "infill": ["a ", {"gap": 4}, "."]})
    assert response.status == 500 and "secret" not in response.text
    monkeypatch.undo()
    assert infilled(client, TEXTS[0]).choices[0].text == offline.infill(TEXTS[0])[0].text


GAP = {"gap": 4}
WRONG = [
    ({"infill": ["a"]}, 'infill has no gap, so nothing is to be filled in; write one as {"gap": 8}.', "infill"),
    ({"infill": [GAP, 5]}, 'infill.1 must be a text, a list of token ids, or a gap, such as {"gap": 8}.', "infill"),
    ({"infill": [{"gap": 4, "x": 1}]}, "infill.0 must be", "infill"),
    ({"infill": [GAP, [True]]}, "infill.1 must be", "infill"),
    ({"infill": [GAP, [2**70]]}, "infill.1 must be", "infill"),
    ({"infill": [{"gap": 0}]}, "infill.0 has the gap 0, it must be its tokens, at least 1, or [fewest, most].",
     "infill"),
    ({"infill": [{"gap": [8, 2]}]}, "infill.0 has the gap [8, 2]", "infill"),
    ({"infill": [{"gap": True}]}, "infill.0 has the gap True", "infill"),
    ({"infill": [{"gap": 10**9}]}, "infill.0 has the gap 1000000000", "infill"),
    ({"infill": [{"gap": [2, 8]}, "."]}, 'insert_delete (LLaDA2.2); give the gap one length, such as {"gap": 8}.',
     "infill"),
    ({"infill": [GAP, [99999]]}, "infill holds token id 99999, outside the vocabulary", "infill"),
    ({"infill": []}, "infill: List should have at least 1 item", "infill"),
    ({"infill": ["a"] * 1001}, "infill: List should have at most 1000", "infill"),
    ({"infill": "a <gap:4> b"}, "infill: Input should be a valid list.", "infill"),
    ({"infill": [GAP, "x\ud800"]}, "half a character", None),
    ({"infill": [{"gap": 200}, "a", {"gap": 60}]}, "infill makes an answer of at least 260 places, this server's have "
     "at most 256.", "infill"),
    ({"infill": [{"gap": 16_000_000}]}, "infill makes an answer of at least 16000000 places", "infill"),
    ({"prompt": "a", "template": [GAP, [5] * 300]}, "template makes an answer of at least 304 places", "template"),
    ({"infill": ["a " * 600, GAP]}, "positions, the model has 512", None),
    ({"infill": [GAP, "."], "max_tokens": 3}, "more than max_new_tokens 3; leave max_new_tokens out.", "infill"),
    ({"infill": [GAP, "."], "stop": ["x"]}, "stop does not go with infill, which says what is behind its gaps; leave "
     "it out.", "stop"),
    ({"infill": [GAP, "."], "prompt": "a"}, "prompt and infill are both given; leave one of them out.", "prompt"),
    ({}, "prompt is missing; give it, or a text with gaps as infill.", "prompt"),
    ({"infill": [GAP], "template": [GAP]}, "template and infill both say what the answer is made of; give one of them.",
     "infill"),
    ({"infill": [GAP], "suffix": "x"}, "suffix and infill both say", "infill"),
    ({"prompt": "a", "suffix": "b", "template": [GAP]}, "template and suffix both say", "suffix"),
    ({"prompt": "a", "suffix": 5}, "suffix: Input should be a valid string.", "suffix"),
    ({"prompt": "a", "suffix": "b", "max_tokens": 0}, "max_new_tokens is 0, it must be at least 1.", "max_tokens"),
    ({"prompt": "a", "suffix": "b", "max_tokens": "8"}, "max_new_tokens is '8', it must be an integer.", "max_tokens"),
    ({"prompt": "a", "suffix": "b", "max_tokens": 257}, "at most 256 tokens", "max_tokens"),
    ({"prompt": "a", "suffix": " b" * 100, "max_tokens": 200}, "suffix makes an answer of", "suffix"),
    ({"prompt": "a", "template": ["b"]}, "template has no gap", "template"),
    ({"prompt": "a", "template": ["b " * 300, GAP]}, "template makes an answer of", "template"),
]


@pytest.mark.parametrize(("body", "words", "param"), WRONG, ids=range(len(WRONG)))
def test_what_is_refused(url, body, words, param):
    response = ask(f"{url}/v1/completions", {"model": "sample", **body})
    error = response.json()["error"]
    assert response.status == 400 and words in error["message"] and error["param"] == param
    assert error["message"].count(". ") == 0 and error["message"].endswith(".")


def test_chat_has_no_suffix_and_no_infill(url):
    messages = [{"role": "user", "content": QUESTION}]
    for field, value in (("suffix", "x"), ("infill", [GAP])):
        response = ask(f"{url}/v1/chat/completions", {"model": "sample", "messages": messages, field: value})
        assert response.status == 400 and response.json()["error"]["param"] == field


def test_states_of_a_text_with_gaps_say_which_places_are_given(url, offline):
    parts = ["what is ", Gap(3), " plus 3? " + "it is so. " * 8, Gap(40), "."]
    body = {"model": "sample", "infill": over_http(parts), "acceptance": "fixed", "steps": 4}
    events = ask(url + CHAT, body).events()
    wanted = offline.infill(parts, acceptance="fixed", steps=4)[0]
    name, done = events[-1]
    assert name == "done" and [one["token_ids"] for one in done["gaps"]] == [gap.token_ids for gap in wanted.gaps]
    assert done["finish_reason"] == "stop" and done["usage"]["completion_tokens"] == 43
    assert "".join(data["text"] for name, data in events if name == "block") == wanted.text
    filled = [{}, {}]
    for state in (data for name, data in events if name == "step"):
        assert len(state["gaps"]) == len(state["token_ids"])
        for i, (gap, token) in enumerate(zip(state["gaps"], state["token_ids"], strict=True)):
            if gap >= 0:
                filled[gap][state["start"] + i] = token
            else:
                assert token >= 0 and i not in state["new"]
    assert [list(one.values()) for one in filled] == [gap.token_ids for gap in wanted.gaps]


@pytest.mark.parametrize(("body", "sentence"), [
    ({}, "messages is missing; give it, or a text with gaps as infill."),
    ({"infill": [GAP], "messages": [{"role": "user", "content": "x"}]}, "messages and infill are both given; leave one "
     "of them out."),
    ({"infill": [GAP], "chat_template_kwargs": {"x": 1}}, "infill goes through no chat template; leave "
     "chat_template_kwargs and tools out."),
    ({"infill": ["x"]}, 'infill has no gap, so nothing is to be filled in; write one as {"gap": 8}.')])
def test_states_refuse_what_they_cannot_show(url, body, sentence):
    response = ask(url + CHAT, {"model": "sample", **body})
    assert response.status == 400 and response.json()["error"]["message"] == sentence


def test_a_prompt_in_the_log_is_what_was_sent(url, house, capfd):
    house.log_prompts = True
    try:
        ask(f"{url}/v1/completions", {"model": "sample", "infill": ["a ", GAP]})
    finally:
        house.log_prompts = False
    said, end = "", time.monotonic() + 10
    while '"prompt"' not in said and time.monotonic() < end:  # it is written after the answer
        said += capfd.readouterr().err
        time.sleep(0.01)
    (line,) = [json.loads(one) for one in said.splitlines() if '"prompt"' in one]
    assert line["prompt"] == [["a ", GAP]] and line["new_tokens"] <= 4


def test_probabilities_are_those_of_what_is_read(client, offline):
    parts = ["max has ", Gap(40), " and ", Gap(3), "."]
    wanted = offline.infill(parts, logprobs=2)[0].answer.probabilities
    choice = infilled(client, parts, logprobs=2).choices[0]
    before = len(offline.infilling(parts).token_ids)
    assert choice.logprobs.token_logprobs == [None] * before + [one.logprob for one in wanted]
    assert len(choice.logprobs.tokens) == len(choice.model_extra["token_ids"])
    first, second = (gap["text_offset"] for gap in choice.model_extra["gaps"])  # a text's first blank is in its token
    assert choice.logprobs.text_offset[before + 40 + 1] - choice.logprobs.text_offset[before] == second - first
    gap = client.completions.create(model="sample", prompt="max has ", suffix=" and", max_tokens=40, logprobs=0)
    logprobs = offline.infill(["max has ", Gap(40), " and"], logprobs=0)[0].answer.probabilities[:40]
    assert gap.choices[0].logprobs.token_logprobs == [one.logprob for one in logprobs]
