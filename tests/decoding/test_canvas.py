"""Canvases of random tokens, on a denoiser of hashes that notices whatever it should not see (canvas_loop.py)."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from canvas_loop import EOS, VOCAB, C, CanvasToy
from hypothesis import given, settings
from hypothesis import strategies as st
from joining import Asked, check, live
from toy_backend import Toy, decode

from dmoe_export.decoding.batch import JoiningBatch
from dmoe_export.decoding.entropy_bound import entropy_bound
from dmoe_export.decoding.noise import KeyedNoise
from dmoe_export.decoding.settings import CANVAS_DEFAULTS, OPTIONS, DecodeSettings
from dmoe_export.errors import LengthError, NotFiniteError, RequestError

LOOSE = {"entropy_bound": 4.0, "confidence_threshold": 1.0}


def options(random):
    return {"max_new_tokens": random.randint(1, 4 * C), "steps": random.randint(1, 9), "seed": random.randint(0, 9),
            "entropy_bound": random.choice([0.0, 0.1, 2.0, 50.0]), "t_min": random.choice([0.0, 0.4]),
            "t_max": random.choice([0.4, 0.8, 2.0]), "stability_threshold": random.randint(0, 3),
            "confidence_threshold": random.choice([0.0, 0.5, 9.0]), "early_stop": random.random() < 0.5,
            "eos_id": random.choice([None, -1, [EOS, 5, 6]]), "cache": random.choice(["auto", "block"]),
            "schedule": random.choice(["merged", "reference"])}


def requests(random, most=8):
    return [Asked(random.choices(range(VOCAB), k=random.randint(1, 3 * C)), options(random), random.randint(0, 3),
                  random.choice([None, None, random.randrange(VOCAB)])) for _ in range(random.randint(1, most))]


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**32))
def test_an_answer_is_that_of_the_request_alone(seed):
    """Rows at other canvases, steps and phases; joining late; cancelled ones are beginnings of their answers."""
    random = Random(seed)
    rows, batch = requests(random), JoiningBatch(CanvasToy(), random.randint(1, 4))
    live(batch, rows, random, random.choice([0, 0.1, 0.3]))
    check(rows, CanvasToy())
    assert not any(batch._cache.rows)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**32))
def test_text_is_encoded_in_pieces_of_any_length(seed):
    """An engine's forwards are narrow: prefills come in chunks, or are cut beside steps."""
    random, width = Random(seed), C + Random(seed).randint(0, C)
    fast, rows = random.choice([None, C, C + 1]), requests(random)
    backend = CanvasToy(width, fast)
    live(JoiningBatch(backend, random.randint(1, 4)), rows, random, cancelling=0)
    assert all(inputs.input_ids.shape[1] <= width for inputs in backend.seen)
    check(rows, CanvasToy(), prefills=False)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**32))
def test_lengths_ends_and_counts(seed):
    random = Random(seed)
    asked = options(random)
    prompt = random.choices(range(VOCAB), k=random.randint(1, 3 * C))
    (tokens,), (end,) = decode(CanvasToy(), [prompt], **asked)
    statistics, canvases = end.statistics, end.statistics.blocks
    assert len(tokens) == statistics.new_tokens and set(tokens) <= set(range(VOCAB))
    assert statistics.forwards_by_phase["commit"] == canvases - 1 and statistics.forwards_by_phase["prefill"] == 1
    assert canvases <= statistics.forwards_by_phase["denoise"] <= canvases * asked["steps"]
    kept = statistics.accepted_by_step
    assert len(kept) == statistics.forwards_by_phase["denoise"] - canvases and all(1 <= one <= C for one in kept)
    assert statistics.accepted_places == (sum(kept) / len(kept) if kept else None)
    assert statistics.as_dict().get("accepted_places") == statistics.accepted_places
    if end.finish_reason == "length":
        assert len(tokens) == asked["max_new_tokens"] and canvases == -(-len(tokens) // C)
    else:
        free, _ = decode(CanvasToy(), [prompt], **asked | {"eos_id": -1})
        ends = [EOS] if asked["eos_id"] is None else asked["eos_id"]
        assert end.finish_reason == "eos" and free[0][:len(tokens)] == tokens and not {*tokens} & {*ends}
        assert free[0][len(tokens)] in ends and canvases == len(tokens) // C + 1
    again, _ = decode(CanvasToy(), [prompt], **asked)
    assert again == [tokens]


def test_an_end_in_the_first_canvas_is_the_last_forward():
    free, _ = decode(CanvasToy(), [[5, 7, 9]], max_new_tokens=3 * C, eos_id=-1, steps=3)
    (tokens,), (end,) = decode(CanvasToy(), [[5, 7, 9]], max_new_tokens=3 * C, eos_id=free[0][2], steps=3)
    assert tokens == free[0][:free[0].index(free[0][2])] and end.finish_reason == "eos"
    assert end.statistics.forwards_by_phase == {"prefill": 1, "full": 0, "denoise": 3, "commit": 0}


def test_seeds_count_and_a_row_draws_with_seed_plus_its_index():
    def ask(prompts, seed):
        return decode(CanvasToy(), prompts, max_new_tokens=2 * C, eos_id=-1, steps=1, seed=seed)[0]

    prompt = [4, 5]
    rows = ask([prompt] * 3, 7)
    assert len({tuple(row) for row in rows}) == 3
    assert rows == [ask([prompt], 7 + i)[0] for i in range(3)]
    assert ask([prompt], 2**128 - 1) != ask([prompt], 0)


def test_noise_is_a_function_of_seed_canvas_step_and_place():
    one = KeyedNoise(3, 4096, 1000)
    assert np.array_equal(one.again(2, 5), KeyedNoise(3, 4096, 1000).again(2, 5))
    assert np.array_equal(one.again(2, 5)[:7], KeyedNoise(3, 7, 1000).again(2, 5))  # a place's own
    draws = [one.first(0), one.first(1), one.again(0, 0), one.again(0, 1), one.again(1, 0),
             KeyedNoise(4, 4096, 1000).first(0)]
    for i, mine in enumerate(draws):
        assert mine.min() >= 0 and mine.max() == 999 and 480 < mine.mean() < 520
        assert all(np.mean(mine == other) < 0.01 for other in draws[:i])
    uniform = one.uniform(0, 0)
    assert uniform.dtype == np.float32 and uniform.min() >= 0 and uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.02 and abs(np.corrcoef(uniform, one.first(0))[0, 1]) < 0.05
    # Held, so that answers of a seed stay the same in the next version.
    assert KeyedNoise(0, 4, 262144).first(0).tolist() == [3026, 63320, 29209, 147957]
    assert KeyedNoise(0, 2, 262144).uniform(1, 2).tolist() == [0.6595551371574402, 0.5818596482276917]


@pytest.mark.parametrize(("entropy", "bound", "accepted"), [
    ([0.3, 0.1, 0.2, 0.4], 0.0, [1]), ([0.3, 0.1, 0.2, 0.4], 0.125, [1, 2]), ([0.3, 0.1, 0.2, 0.4], 0.35, [0, 1, 2]),
    ([0.25, 0.25, 0.25], 0.25, [0, 1]), ([0.25, 0.25, 0.25], 0.2, [0]), ([0.0, 5.0, 0.0, 5.0], 0.0, [0, 1, 2]),
    ([7.0, 7.5], 0.1, [0]), ([7.0], 0.0, [0]), ([0.5, 0.25, 0.5], 0.75, [0, 1, 2])])
def test_the_entropy_bound(entropy, bound, accepted):
    """Rising, the sum before at most the bound, at least one, of equals the lower place."""
    assert np.flatnonzero(entropy_bound(np.array(entropy, np.float32), bound)).tolist() == accepted


def steps_seen(**options):
    backend, seen = CanvasToy(), []
    batch = JoiningBatch(backend, 1)
    batch.add([5, 6, 7], DecodeSettings(**{"max_new_tokens": C, "eos_id": -1, **options}), watch=seen.append)
    while len(batch):
        batch.step()
    return [inputs for inputs in backend.seen if inputs.canvas.denoise.any()], [s for s in seen if s.phase == "denoise"]


def test_temperatures_fall_from_t_max_and_soft_embeddings_come_back():
    forwards, _ = steps_seen(steps=4, confidence_threshold=0.0, t_max=0.8, t_min=0.4)
    assert [float(f.canvas.temperature[0]) for f in forwards] == pytest.approx([0.8, 0.7, 0.6, 0.5])
    assert [float(f.canvas.soft_embeddings[0, 0, 0]) for f in forwards] == [0, 1, 2, 3]  # the toy counts steps there
    two = steps_seen(steps=2, confidence_threshold=0.0, max_new_tokens=2 * C)[0]
    assert [float(f.canvas.soft_embeddings[0, 0, 0]) for f in two] == [0, 1, 0, 1]  # a canvas begins anew


def test_the_canvas_is_what_was_accepted_and_noise_elsewhere():
    for bound, few in ((0.0, True), (1e9, False)):
        forwards, seen = steps_seen(steps=5, confidence_threshold=0.0, entropy_bound=bound, seed=2)
        noise = KeyedNoise(2, C, VOCAB)
        assert np.array_equal(forwards[0].input_ids[0], noise.first(0))
        for step, (inputs, state) in enumerate(zip(forwards[1:], seen, strict=False)):
            kept = np.isin(np.arange(C), state.new)
            assert (1 <= kept.sum() < C) if few else kept.all()
            assert np.array_equal(inputs.input_ids[0][~kept], noise.again(0, step)[~kept])
        assert seen[-1].new == list(range(C)) and seen[-1].token_ids == seen[-1].candidates


@pytest.mark.parametrize("stability", [0, 1, 2, 3])
def test_it_stops_when_stable_and_sure(stability):
    _, seen = steps_seen(steps=30, stability_threshold=stability, **LOOSE)
    best = [state.candidates for state in seen]
    sure = 1 if stability == 0 else None
    assert len(seen) < 30
    same = [len(set(map(tuple, best[i - stability:i + 1]))) == 1 for i in range(stability, len(best))]
    assert same[-1]
    if sure is None:  # sure long before it was stable, so the first stable step was the last
        always = steps_seen(steps=30, stability_threshold=0, **LOOSE)[1]
        assert len(always) <= len(seen) and not any(same[len(always) - stability:-1])
    assert len(steps_seen(steps=30, stability_threshold=stability, confidence_threshold=0.0)[1]) == 30


def test_a_canvas_longer_than_the_answer_and_one_step():
    (tokens,), (end,) = decode(CanvasToy(), [[5]], max_new_tokens=2, eos_id=-1, steps=1)
    assert len(tokens) == 2 and end.statistics.forwards_by_phase["denoise"] == 1 and end.finish_reason == "length"


def test_positions_of_whole_canvases_are_counted():
    backend = CanvasToy(most=4 * C)
    assert len(decode(backend, [[5] * C], max_new_tokens=3 * C, eos_id=-1)[0][0]) == 3 * C
    with pytest.raises(LengthError, match=rf"Prompt 0 of 7 tokens and {2 * C + 1} new need {7 + 3 * C} positions"):
        decode(backend, [[5] * (C + 1)], max_new_tokens=2 * C + 1)


def test_numbers_that_are_not_finite_end_their_row():
    class Broken(CanvasToy):
        def forward(self, inputs, cache):
            outputs = super().forward(inputs, cache)
            outputs.canvas.entropy[(inputs.position_ids[:, 0] == 1) & inputs.canvas.denoise, -1] = np.nan
            return outputs

    batch = JoiningBatch(Broken(), 2)
    rows = [Asked([5], {"max_new_tokens": C}), Asked([5, 6], {"max_new_tokens": 2 * C})]
    live(batch, rows, Random(0), cancelling=0)
    assert isinstance(rows[0].last.error, NotFiniteError) and rows[0].tokens == []
    check(rows[1:], CanvasToy())


@pytest.mark.parametrize("name", sorted(CANVAS_DEFAULTS))
def test_options_of_a_canvas_are_refused_elsewhere(name):
    assert OPTIONS[name].default is None and OPTIONS[name].shown == f"the bundle's, or {CANVAS_DEFAULTS[name]}"
    one = {name: CANVAS_DEFAULTS[name]}
    with pytest.raises(RequestError, match=f"^{name} belongs to models that denoise a canvas of random tokens, and"):
        decode(Toy(), [[5]], **one)
    assert decode(CanvasToy(), [[5]], **one)[0] == decode(CanvasToy(), [[5]])[0]


@pytest.mark.parametrize("one", [
    {"block_length": C}, {"acceptance": "fixed"}, {"threshold": 0.5}, {"factor": 2.0}, {"low_threshold": 0.1},
    {"credit_alpha": 0.0}, {"credit_beta": 0.0}, {"credit_gamma": 0.0}, {"edit_threshold": 0.5}, {"edit_passes": 3},
    {"salient_threshold": 0.9}, {"temperature": 1.0}, {"top_k": 5}, {"top_p": 0.5}], ids=lambda one: next(iter(one)))
def test_options_of_masks_are_refused_with_a_canvas(one):
    with pytest.raises(RequestError, match=f"^{next(iter(one))} means nothing for family toy, which denoises a canv"):
        decode(CanvasToy(), [[5]], **one)


def test_other_refusals():
    for cache in ("none", "prefix", "dual"):
        with pytest.raises(RequestError, match=f"Cache {cache} is not offered for family toy, which encodes text and"):
            decode(CanvasToy(), [[5]], cache=cache)
    for one in ({"t_max": 0.3}, {"t_min": 0.9}, {"t_min": 0.0, "t_max": 0.0}):
        with pytest.raises(RequestError, match=r"t_max is 0\.\d, it must be above 0 and at least t_min, which is 0"):
            decode(CanvasToy(), [[5]], **one)
    with pytest.raises(RequestError, match="A prefix cache keeps blocks of one length from the text's start on, and"):
        JoiningBatch(CanvasToy(), 1, prefix_cache=10**6)
    with pytest.raises(RequestError, match=f"The engine takes at most {C - 1} tokens in one forward, a block has {C}"):
        decode(CanvasToy(max_tokens=C - 1), [[5]])
