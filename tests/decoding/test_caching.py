"""Cache policies: what they must agree on, what they cost, what is refused. On a model of hashes (toy_backend.py)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_backend import MASK, N, Toy, decode

from dmoe_export.decoding.loop import BlockDiffusion
from dmoe_export.decoding.settings import ACCEPTANCES, DecodeSettings
from dmoe_export.errors import RequestError
from dmoe_export.runtime.cache import HostCache

OF = {"block_causal": ("block", "none"), "full": ("none", "prefix", "dual")}
PROMPTS = st.lists(st.lists(st.integers(3, 20), min_size=1, max_size=10), min_size=1, max_size=3)
OPTIONS = st.fixed_dictionaries({
    "max_new_tokens": st.integers(1, 14), "steps": st.sampled_from([1, 2, 3, 4, 9]),
    "acceptance": st.sampled_from(ACCEPTANCES), "threshold": st.sampled_from([0.0, 0.6, 0.95, 1.0]),
    "edit_threshold": st.sampled_from([None, None, 0.0, 0.5, 1.0]), "edit_passes": st.sampled_from([0, 1, 3]),
    "temperature": st.sampled_from([0.0, 0.0, 1.5]), "early_stop": st.booleans(),
    "eos_id": st.sampled_from([None, -1]), "seed": st.integers(0, 5)})


def _same(got, want):
    assert got[0] == want[0]
    assert [b.finish_reason for b in got[1]] == [b.finish_reason for b in want[1]]


@settings(max_examples=60, deadline=None)
@given(PROMPTS, OPTIONS)
def test_the_block_cache_is_exact(prompts, options):
    cached, plain = (decode(Toy(), prompts, cache=cache, **options) for cache in ("block", "none"))
    _same(cached, plain)
    for mine, theirs in zip(cached[1], plain[1], strict=True):
        assert mine.statistics.forwards_by_phase["denoise"] == theirs.statistics.forwards_by_phase["full"]
        assert mine.statistics.edits == theirs.statistics.edits


@settings(max_examples=60, deadline=None)
@given(PROMPTS, OPTIONS, st.booleans(), st.integers(0, 1), st.sampled_from([None, 1, 3, 6]))
def test_full_canvas_caches_are_exact_for_one_layer(prompts, options, shift, depth, block_length):
    """A layer's keys come from tokens, and those outside the block do not change while it is decoded."""
    backends = {cache: Toy("full", shift, depth) for cache in OF["full"]}
    results = {cache: decode(backend, prompts, cache=cache, block_length=block_length, **options)
               for cache, backend in backends.items()}
    for cache in ("prefix", "dual"):
        _same(results[cache], results["none"])
        for mine, plain in zip(results[cache][1], results["none"][1], strict=True):
            assert mine.statistics.forwards == plain.statistics.forwards
            assert mine.statistics.forwards_by_phase["full"] == mine.statistics.blocks
            assert mine.statistics.forwards_by_phase["commit"] == 0
    queries = [sum((inputs.position_ids >= 0).sum() for inputs in backends[cache].seen) for cache in OF["full"]]
    assert queries[0] >= queries[1] >= queries[2]


@settings(max_examples=80, deadline=None)
@given(st.data(), st.sampled_from(list(OF)), PROMPTS, OPTIONS)
def test_rows_do_not_depend_on_their_neighbours(data, attention, prompts, options):
    cache = data.draw(st.sampled_from(OF[attention]))
    shift = attention == "full" and data.draw(st.booleans())
    together = decode(Toy(attention, shift), prompts, cache=cache, **options)
    for i, prompt in enumerate(prompts):
        alone = decode(Toy(attention, shift), [prompt], cache=cache, **{**options, "seed": options["seed"] + i})
        assert together[0][i] == alone[0][0]
        mine, theirs = together[1][i], alone[1][0]
        assert mine.finish_reason == theirs.finish_reason
        assert mine.statistics.forwards_by_phase == theirs.statistics.forwards_by_phase


@settings(max_examples=80, deadline=None)
@given(st.data(), st.sampled_from(list(OF)), PROMPTS, OPTIONS)
def test_every_step_makes_progress_and_no_mask_is_emitted(data, attention, prompts, options):
    cache = data.draw(st.sampled_from(OF[attention]))
    tokens, last = decode(Toy(attention), prompts, cache=cache, **options)
    for prompt, answer, end in zip(prompts, tokens, last, strict=True):
        assert MASK not in answer
        statistics, lengths = end.statistics, len(prompt) % N * (attention != "full") + options["max_new_tokens"]
        assert len(answer) == statistics.new_tokens <= options["max_new_tokens"]
        assert (end.finish_reason == "length") == (len(answer) == options["max_new_tokens"])
        edits = 0 if options["edit_threshold"] is None else options["edit_passes"]
        steps = statistics.forwards_by_phase["denoise"] + statistics.forwards_by_phase["full"]
        assert 1 <= steps <= -(-lengths // N) * (min(N, options["steps"]) + edits)
        assert statistics.blocks <= -(-lengths // N)


def test_what_each_policy_asks_for():
    """Prompt of 5, 8 new tokens, two steps per block."""
    options = {"max_new_tokens": 8, "steps": 2, "acceptance": "fixed", "eos_id": -1}

    def asked(cache, shift=False):
        toy = Toy("full", shift)
        decode(toy, [[7] * 5], cache=cache, **options)
        return [(int(i.position_ids[0, 0]), int(i.position_ids[0, -1]) + 1, i.want_keys_values) for i in toy.seen]

    assert asked("none") == [(0, 13, False)] * 4
    assert asked("auto") == asked("prefix") == [(0, 13, True), (5, 13, False), (0, 13, True), (9, 13, False)]
    assert asked("dual") == [(0, 13, True), (5, 9, False), (0, 13, True), (9, 13, False)]
    assert asked("dual", shift=True) == [(0, 13, True), (4, 9, False), (0, 13, True), (8, 13, False)]


def test_a_block_that_its_full_forward_finishes_needs_no_other():
    statistics = decode(Toy("full"), [[7] * 5], max_new_tokens=8, steps=1, eos_id=-1)[1][0].statistics
    assert statistics.forwards_by_phase == {"prefill": 0, "full": 2, "denoise": 0, "commit": 0}


def test_wide_forwards_wait_until_all_rows_want_one():
    """Rows finish their blocks at different times; the narrow one waits, and counts only its own forwards."""
    toy = Toy("full")
    _, last = decode(toy, [[7] * 5, [9] * 3], max_new_tokens=8, cache="dual", threshold=0.6, eos_id=-1)
    wide = [inputs for inputs in toy.seen if (inputs.position_ids == 0).any()]
    assert len(wide) == 2 and all((inputs.position_ids[:, 0] == 0).all() for inputs in wide)
    counts = [block.statistics.forwards for block in last]
    assert counts[0] != counts[1] and max(counts) <= len(toy.seen) < sum(counts)


def test_an_edit_pass_that_changes_nothing_is_the_commit():
    options = {"max_new_tokens": 8, "steps": 4, "acceptance": "fixed", "eos_id": -1}
    plain = decode(Toy(), [[7] * 4], **options)
    edited = decode(Toy(), [[7] * 4], edit_threshold=1.0, **options)  # nothing is surer than certain
    assert edited[0] == plain[0] and edited[1][0].statistics.edits == 0
    assert plain[1][0].statistics.forwards_by_phase == {"prefill": 1, "full": 0, "denoise": 8, "commit": 1}
    assert edited[1][0].statistics.forwards_by_phase == {"prefill": 1, "full": 0, "denoise": 10, "commit": 0}


@pytest.mark.parametrize(("attention", "shift", "options", "message"), [
    ("full", False, {"cache": "block"}, "exact only where blocks see no later ones.*use none, prefix or dual"),
    ("block_causal", False, {"cache": "prefix"}, "Cache prefix is an approximation.*use block or none"),
    ("block_causal", False, {"cache": "dual"}, "Cache dual is an approximation"),
    ("block_causal", True, {}, "shifted logits.*use none"),
    ("block_causal", False, {"block_length": 8}, "block_length 8 differs from the bundle's 4"),
])
def test_nonsense_is_refused(attention, shift, options, message):
    with pytest.raises(RequestError, match=message):
        BlockDiffusion(Toy(attention, shift), DecodeSettings(**options))


@pytest.mark.parametrize(("attention", "options", "needed"), [
    ("full", {}, 13), ("full", {"cache": "none"}, 13), ("block_causal", {"cache": "none"}, 16)])
def test_forwards_longer_than_an_engine_takes_are_refused(attention, options, needed):
    loop = BlockDiffusion(Toy(attention, max_tokens=12), DecodeSettings(max_new_tokens=8, **options))
    with pytest.raises(RequestError, match=rf"forwards of {needed} tokens, .* at most 12; .*--max-prefill 16\.$"):
        list(loop.decode([[7], [7] * 5]))
    assert decode(Toy(attention, max_tokens=16), [[7] * 5], max_new_tokens=8, **options)[1]


def test_the_host_cache_forgets_rows():
    cache = HostCache(3, [(1, 1)], np.dtype(np.float32))
    cache.positions, cache.lengths = np.array([[0, 1], [0, -1], [4, 5]]), np.array([2, 1, 2])
    cache.clear([0, 1])
    assert cache.positions.tolist() == [[-1, -1], [-1, -1], [4, 5]] and cache.lengths.tolist() == [0, 0, 2]
