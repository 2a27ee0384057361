"""The sample's tasks and tokenizer: right answers, a disjoint split, texts the tokenizer knows."""

from __future__ import annotations

import itertools
import json
import random
import re
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

SAMPLES = Path(__file__).parents[2] / "samples"
CHECKPOINT = SAMPLES / "tiny-dmoe"
sys.path.insert(0, str(SAMPLES))

import make_tokenizer  # noqa: E402
import tasks  # noqa: E402

POSITIONS = 64
HELD_OUT = [json.loads(line) for line in (CHECKPOINT / "held_out.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))


@pytest.fixture(scope="module")
def training() -> list[tasks.Example]:
    return list(itertools.islice(tasks.training_examples(seed=1), 3000))


def drawn(task: str, count: int = 1000) -> list[tasks.Example]:
    rng = random.Random(5)
    return [tasks.TASKS[task](rng) for _ in range(count)]


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def test_generators_are_pure_functions_of_the_seed() -> None:
    for task in tasks.TASKS:
        assert drawn(task, 50) == drawn(task, 50)


def test_arithmetic_is_right_and_uses_the_numbers_of_the_question() -> None:
    apply = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "x": lambda a, b: a * b}
    for example in drawn("arithmetic"):
        steps = re.findall(r"(\d+) ([-+x]) (\d+) = (\d+)", example.answer)
        assert steps
        for left, sign, right, result in steps:
            assert apply[sign](int(left), int(right)) == int(result) > 0
        operands = [int(steps[0][0]), *(int(right) for _, _, right, _ in steps)]
        assert sorted(operands) == sorted(numbers(example.question))
        if len(steps) == 2:
            assert steps[0][3] == steps[1][0]


def test_facts_have_one_answer_each() -> None:
    answers: dict[str, str] = {}
    for example in drawn("facts"):
        assert answers.setdefault(example.question, example.answer) == example.answer
    france = {answer for question, answer in answers.items() if "capital of france" in question}
    assert france == {"the capital of france is paris."}


def test_list_operations_are_right() -> None:
    for example in drawn("lists"):
        digits, found = numbers(example.question), numbers(example.answer)
        if "reverse" in example.question or "last to first" in example.question:
            assert found == digits[::-1]
        elif "=" in example.answer:
            assert found == [*digits, sum(digits)]
        elif "has" in example.answer:
            assert found == [len(digits)]
        elif "number is" in example.answer:
            which = example.answer.split()[1]
            assert which in example.question and found == [tasks.PICKS[which](digits)]
        else:
            assert found == sorted(digits)


def test_training_never_sees_a_held_out_question(training: list[tasks.Example]) -> None:
    held_out = {row["question"] for row in HELD_OUT}
    assert len(held_out) == len(HELD_OUT) == 400
    assert all(tasks.is_held_out(question) for question in held_out)
    assert not any(tasks.is_held_out(example.question) for example in training)


def test_held_out_file_is_what_the_generator_gives() -> None:
    expected = [{"question": e.question, "answer": e.answer, "task": e.task} for e in tasks.held_out_examples(400)]
    assert expected == HELD_OUT


def test_everything_fits_two_blocks_and_prompts_vary(tokenizer: Tokenizer, training: list[tasks.Example]) -> None:
    prompts, ends = [], []
    for example in training:
        prompt = f"<role>HUMAN</role>{example.question}<|role_end|><role>ASSISTANT</role>"
        prompts.append(len(tokenizer.encode(prompt).ids))
        ends.append(prompts[-1] + len(tokenizer.encode(example.answer).ids) + 1)
    assert max(ends) <= POSITIONS
    assert any(prompt >= 32 for prompt in prompts)
    assert any(end <= 32 for end in ends)
    assert any(prompt < 32 < end for prompt, end in zip(prompts, ends, strict=True))


def test_tokenizer_round_trip_without_unknown_words(tokenizer: Tokenizer, training: list[tasks.Example]) -> None:
    rows = HELD_OUT + [{"question": e.question, "answer": e.answer} for e in training]
    for text in (row[key] for row in rows for key in ("question", "answer")):
        encoded = tokenizer.encode(text)
        assert make_tokenizer.UNKNOWN not in encoded.tokens
        assert tokenizer.decode(encoded.ids) == text


def test_vocabulary_is_dense_and_special_tokens_are_special(tokenizer: Tokenizer) -> None:
    vocabulary = tokenizer.get_vocab()
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    assert special == set(make_tokenizer.SPECIAL)
    assert tokenizer.decode([vocabulary[token] for token in make_tokenizer.SPECIAL]) == ""
    config = json.loads((CHECKPOINT / "config.json").read_text())
    assert config["vocab_size"] == len(vocabulary)
    assert config["mask_token_id"] == vocabulary[make_tokenizer.MASK]
    assert config["eos_token_id"] == config["pad_token_id"] == vocabulary[make_tokenizer.EOS]


def test_saved_tokenizer_is_what_the_script_builds(tokenizer: Tokenizer) -> None:
    assert make_tokenizer.build_tokenizer().to_str() == tokenizer.to_str()


def test_capital_letters_and_spaces_do_not_matter(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("What is the capital of  France ?").ids == tokenizer.encode(
        "what is the capital of france?").ids
    working = "12 + 7 = 19, 19 - 5 = 14 apples"
    assert tokenizer.decode(tokenizer.encode(working).ids) == working
