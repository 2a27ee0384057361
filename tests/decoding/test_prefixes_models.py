"""The prefix store on models: answers and cached numbers are those of prompts that were computed anew."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import SAMPLE
from device_helpers import host_backend

from dmoe_export.generator import Generator

pytestmark = pytest.mark.usefixtures("our_kernels")
QUESTIONS = [json.loads(line)["question"] for line in (SAMPLE / "held_out.jsonl").read_text().splitlines()]
SYSTEM = {"role": "system", "content": " ".join(QUESTIONS[200:214])}


def chat(i, *more):
    return [SYSTEM, {"role": "user", "content": QUESTIONS[i]}, *more]


def opened(bundle, **options):
    return Generator.open(bundle.folder, backend="onnxruntime", threads=1, verify="sizes", **options)


def answers(batch, requests):
    """The requests, two of them at once, in their order; each with its last statistics."""
    waiting, rows, tokens, last = list(requests), [], {}, {}
    while waiting or len(batch):
        while waiting and batch.free:
            rows.append(batch.add(waiting.pop(0)))
        for event in batch.step():
            assert event.error is None
            tokens[event.handle] = tokens.get(event.handle, []) + event.block.token_ids
            last[event.handle] = event.block.stats
    return [tokens[row] for row in rows], [last[row] for row in rows]


@pytest.mark.parametrize(("bundle", "options"), [
    ("sample_bundle", {}), ("half_sample_bundle", {}), ("sample_bundle", {"expert_budget": "25%"})])
def test_a_shared_system_prompt(request, bundle, options):
    """Single questions, and the second question of a conversation, whose answer is taken, too."""
    with opened(request.getfixturevalue(bundle), **options) as generator:
        wanted = [generator.generate([chat(i)], max_new_tokens=64)[0] for i in range(6)]
        later = chat(3, {"role": "assistant", "content": wanted[3].text}, {"role": "user", "content": QUESTIONS[7]})
        batch = generator.batch(2, prefix_cache="64M")
        asked = [generator.request(chat(i), max_new_tokens=64) for i in range(6)]
        got, statistics = answers(batch, asked)
        assert got == [one.token_ids for one in wanted]
        shared = [one.prefix_tokens for one in statistics]
        assert shared[0] == 0 and min(shared[1:]) >= 4 * 32, shared
        (second,), (of_second,) = answers(batch, [generator.request(later, max_new_tokens=64)])
        assert second == generator.generate([later], max_new_tokens=64)[0].token_ids
        assert of_second.prefix_tokens >= len(asked[3].token_ids) // 32 * 32
        state = batch.prefixes.statistics()
        assert state.hit_blocks * 32 == sum(shared) + of_second.prefix_tokens and state.evicted_blocks == 0
        assert generator.batch(1).prefixes is None
        assert generator.generate([chat(0)])[0].stats.as_dict()["prefix_tokens"] == 0


@pytest.mark.parametrize("graphs", [False, True])
def test_on_a_device_blocks_never_pass_through_the_host(sample_bundle, graphs):
    """On a stand-in for CUDA's memory the answers are the same."""
    backend = host_backend(sample_bundle, graphs)
    generator = Generator(sample_bundle, backend)
    requests = [generator.request(chat(i), max_new_tokens=40) for i in range(4)]
    wanted = [generator.generate([chat(i)], max_new_tokens=40)[0].token_ids for i in range(4)]
    batch = generator.batch(2, prefix_cache=20 * 32 * backend.new_cache(1).token_bytes)
    got, statistics = answers(batch, requests)
    assert got == wanted and min(one.prefix_tokens for one in statistics[2:]) >= 4 * 32
    assert batch.prefixes.statistics().blocks >= 8


@pytest.mark.parametrize("bundle", ["sample_bundle", "half_sample_bundle"])
def test_what_a_row_takes_is_what_it_would_compute(request, bundle):
    """Keys and values bit for bit: from prompts of several lengths, a committed answer, and anew."""
    with opened(request.getfixturevalue(bundle)) as generator:
        ids = generator.request(chat(2), max_new_tokens=1).token_ids
        options = {"max_new_tokens": 70, "eos_id": -1, "steps": 4}
        kept, plain = generator.batch(1, prefix_cache="64M"), generator.batch(1)
        answer = []
        for length in (40, 100, 135):  # the last leaves two blocks that its answer went on in
            (answer,), _ = answers(kept, [generator.request(ids[:length], **options)])
        prompt = generator.request(ids[:135] + answer + ids[:90], **options)
        caches, rows = [], []
        for batch in (kept, plain):
            rows.append(batch.add(prompt).row)
            while rows[-1].cached < rows[-1].prefill_length:
                batch.step()
            caches.append(batch._batch._cache)
        stop = rows[0].prefill_length
        assert stop > 8 * 32 and [row.statistics.prefix_tokens for row in rows] == [6 * 32, 0]
        assert (caches[0].positions[0, :stop] == np.arange(stop)).all()
        for mine, theirs in zip(*((*cache.keys, *cache.values) for cache in caches), strict=True):
            assert np.array_equal(mine[0, :, :stop], theirs[0, :, :stop])


def test_rows_of_other_routing_settings_share_nothing(sample_bundle):
    default = sample_bundle.manifest.routing.top_p
    with opened(sample_bundle) as generator:
        batch = generator.batch(1, prefix_cache="64M")
        ways = [{}, {"coreset_top_p": default / 2}, {"coreset_top_p": default}, {"coreset_top_p": default / 2}]
        requests = [generator.request(chat(0), max_new_tokens=32, **way) for way in ways]
        got, statistics = answers(batch, requests)
        assert [one.prefix_tokens > 0 for one in statistics] == [False, False, True, True]
        for way, tokens in zip(ways, got, strict=True):
            assert tokens == generator.generate([chat(0)], max_new_tokens=32, **way)[0].token_ids


def test_salient_rows_leave_exact_blocks(salient_block):
    """What a salient row has committed serves a row without salient steps."""
    prompt = np.random.default_rng(0).integers(3, 90, 40).tolist()
    options = {"max_new_tokens": 64, "eos_id": -1, "steps": 6}
    with opened(salient_block) as generator:
        batch = generator.batch(1, prefix_cache="64M")
        (answer,), _ = answers(batch, [generator.request(prompt, salient_threshold=0.9, **options)])
        later = prompt + answer + [5]
        got, (statistics,) = answers(batch, [generator.request(later, **options)])
        assert statistics.prefix_tokens == (len(later) - 1) // 32 * 32
        assert got == [generator.generate([later], **options)[0].token_ids]
