"""Inserting and deleting on a real graph, and through a generator: caches, streams, stops, statistics."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from joining import Asked, check, live
from toy_backend import decode

from dmoe_export import Gap, Generator
from dmoe_export.decoding.batch import JoiningBatch
from dmoe_export.description import EditTokens
from dmoe_export.runtime.cpu.backend import OnnxRuntimeBackend

pytestmark = pytest.mark.usefixtures("our_kernels")

OPTIONS = {"max_new_tokens": 70, "threshold": 0.02, "edit_threshold": 0.0, "edit_passes": 6, "eos_id": -1}


@pytest.fixture(scope="module")
def edit_tokens(tiny_bundle):
    """What random weights say often, so that much is deleted and inserted."""
    tokens = decode(OnnxRuntimeBackend(tiny_bundle), [[5, 6, 7], [9] * 40], **OPTIONS)[0]
    (delete, _), (split, _) = Counter(tokens[0] + tokens[1]).most_common(2)
    return EditTokens(delete=delete, split=split)


@pytest.fixture
def backend(tiny_bundle, edit_tokens):
    made = OnnxRuntimeBackend(tiny_bundle)
    made.description = made.description.model_copy(update={"edit_tokens": edit_tokens})
    return made


PROMPTS = [[5, 6, 7], [9] * 40, list(range(10, 42))]


def test_caches_and_schedules_give_the_same(backend, edit_tokens):
    found = [decode(backend, PROMPTS, insert_delete=True, **how, **OPTIONS) for how in (
        {"cache": "none"}, {}, {"schedule": "reference"})]
    assert found[0][0] == found[1][0] == found[2][0]
    moved = [(one.statistics.inserted, one.statistics.deleted, one.statistics.edits) for one in found[1][1]]
    assert all(sum(kind) > 0 for kind in zip(*moved, strict=True)), moved
    assert moved == [(one.statistics.inserted, one.statistics.deleted, one.statistics.edits) for one in found[2][1]]
    for tokens in found[0][0]:
        assert len(tokens) == 70 and not {edit_tokens.delete, edit_tokens.split} & set(tokens)


def test_rows_of_any_settings_share_a_batch(backend):
    random = Random(4)
    changes = [{"insert_delete": True}, {"insert_delete": True, "temperature": 0.8, "top_k": 4},
               {"insert_delete": True, "temperature": 0.8}, {}, {"penalty_lambda": 4.0}, {"edit_threshold": None}]
    said = [OPTIONS | {"max_new_tokens": random.randint(1, 64), "seed": i} | changes[i % len(changes)]
            for i in range(8)]
    rows = [Asked(random.choices(range(5, 90), k=random.choice([1, 31, 35, 70])), options, index=i % 3)
            for i, options in enumerate(said)]
    live(JoiningBatch(backend, 3, prefix_cache="1M"), rows, random)
    check(rows, backend, prefills=False)


def generator_of(bundle, edit_tokens):
    manifest = bundle.manifest.model_copy(update={
        "model": bundle.manifest.model.model_copy(update={"edit_tokens": edit_tokens})})
    changed = type(bundle)(bundle.folder, manifest)
    return Generator(changed, OnnxRuntimeBackend(changed))


def test_a_generator_streams_and_stops_it(tiny_bundle, edit_tokens):
    with generator_of(tiny_bundle, edit_tokens) as generator:
        (whole,) = generator.generate([PROMPTS[1]], insert_delete=True, **OPTIONS)
        blocks = list(generator.stream([PROMPTS[1]], insert_delete=True, **OPTIONS))
        assert [token for block in blocks for token in block.token_ids] == whole.token_ids
        assert len(blocks) == whole.stats.blocks > 1  # 40 tokens of prompt: its remainder begins the first
        told = whole.stats.as_dict()
        assert told["inserted"] + told["deleted"] > 0 and whole.stats.new_tokens == 70


def test_a_generator_fills_gaps_of_a_range(tiny_bundle, edit_tokens):
    """Two texts at once: each is as alone; what was found lies where it says, and sees what its block holds."""
    texts = [[[5, 6, 7], Gap(3, 20), [8, 9], Gap(6, 30), [10] * 14, Gap(2), [11]],
             [[9] * 40, Gap(1, 12), [12, 13], Gap(5)]]
    options = {name: value for name, value in OPTIONS.items() if name != "max_new_tokens"} | {"insert_delete": True}
    with generator_of(tiny_bundle, edit_tokens) as generator:
        both = generator.infill(texts, **options)
        for parts, filled in zip(texts, both, strict=True):
            (alone,) = generator.infill(parts, **options)
            assert (alone.gaps, alone.answer.token_ids) == (filled.gaps, filled.answer.token_ids)
            gaps = iter(filled.gaps)
            whole = [next(gaps).token_ids if isinstance(part, Gap) else part for part in parts]
            assert sum(whole[1:], []) == filled.answer.token_ids
            at = len(parts[0])
            for part, tokens, gap in zip(parts[1::2], whole[1::2], filled.gaps, strict=True):
                assert part.fewest <= len(tokens) <= part.places
                at += len(tokens)
                sight = (at - 1) // 32 * 32 + 32
                behind = [len(given) for given in whole[whole.index(tokens) + 1:][::2]]
                assert gap.in_sight <= sum(behind) and (gap.in_sight > 0) == (sight > at and bool(behind))
                at += behind[0] if behind else 0
            told = filled.answer.stats
            assert told.deleted > 0 and len(filled.answer.token_ids) < sum(
                part.places if isinstance(part, Gap) else len(part) for part in parts[1:])
