"""Log-probabilities with real graphs: the tokens of the answer are those without, bit for bit, and counts, too."""

from __future__ import annotations

import numpy as np
import pytest

from dmoe_export.generator import Generator

BLOCKS = [{}, {"cache": "none"}, {"temperature": 1.0, "seed": 3}, {"temperature": 1.0, "top_k": 4, "seed": 3},
          {"acceptance": "credit"}, {"edit_threshold": 0.0}, {"edit_threshold": 0.3, "temperature": 0.8, "top_k": 3}]
CANVASES = [{}, {"cache": "none"}, {"cache": "dual"}, {"salient_threshold": 0.9},
            {"salient_threshold": 0.9, "salient_capacity": 8}, {"temperature": 1.0, "top_k": 4}, {"temperature": 1.0}]


@pytest.fixture(scope="module")
def sample(sample_bundle):
    with Generator.open(sample_bundle.folder, threads=1) as generator:
        yield generator


@pytest.fixture(scope="module")
def llada(salient_llada):
    with Generator.open(salient_llada.folder, threads=1) as generator:
        yield generator


def held(generator, prompts, **options):
    """With logprobs as without; what is said of the answers."""
    plain, said = (generator.generate(prompts, **options, **more) for more in ({}, {"logprobs": 3}))
    for mine, theirs in zip(said, plain, strict=True):
        assert mine.token_ids == theirs.token_ids == [one.token_id for one in mine.probabilities]
        assert mine.stats.forwards_by_phase == theirs.stats.forwards_by_phase and theirs.probabilities is None
        for one in mine.probabilities:
            assert one.logprob <= one.top[0].logprob <= 0 and len(one.top) == 3
            entropy = mine.stats.entropy_by_step[one.step]
            assert entropy >= 0 if entropy is not None else "edit_threshold" in options  # a step that only edits
    return said


@pytest.mark.parametrize("options", BLOCKS, ids=str)
def test_blocks(sample, options):
    answers = held(sample, ["what is 17 + 48?", "sort the list 5 2 9."], max_new_tokens=40, threshold=0.99, **options)
    assert len(answers[0].stats.entropy_by_step) > 1
    for answer in answers:
        text = b"".join(one.utf8 for one in answer.probabilities).decode()
        assert text.removeprefix(" ") == answer.text


@pytest.mark.parametrize("options", CANVASES, ids=str)
def test_whole_canvases(llada, options):
    answers = held(llada, [[5, 6, 7], [9, 4, 8, 11, 3]], max_new_tokens=20, eos_id=-1, steps=4, acceptance="fixed",
                   **options)
    assert all(one.token is None and one.utf8 is None for one in answers[0].probabilities)


def test_the_probability_of_a_greedy_token_is_its_confidence(sample):
    """As those see it who watch."""
    seen = {}

    def watch(step):
        for place in step.new:
            seen[step.start + place] = step.confidence[place]

    batch, said = sample.batch(slots=1), []
    batch.add(sample.request("what is 17 + 48?", threshold=0.99, logprobs=0), watch=watch)
    while len(batch):
        for event in batch.step():
            said += event.block.probabilities
    assert [np.exp(one.logprob) for one in said] == pytest.approx([seen[i] for i in range(len(said))], rel=1e-5)
