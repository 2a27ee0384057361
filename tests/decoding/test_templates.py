"""Given places of an answer, token for token against naive loops (tests/helpers/template_reference.py)."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from canvas_loop import C, CanvasToy
from hypothesis import given, settings
from hypothesis import strategies as st
from joining import Asked, alone, check, live, made
from template_reference import drafted, filled, logits_of, shares
from toy_backend import EOS, MASK, VOCAB, N, Toy, ToyCache

from dmoe_export.decoding.batch import JoiningBatch
from dmoe_export.decoding.settings import ACCEPTANCES, DecodeSettings
from dmoe_export.decoding.way import PREFILL_TOKENS, Way
from dmoe_export.description import EditTokens
from dmoe_export.errors import RequestError

CONTROL = EditTokens(delete=6, split=7)
TEXT = [token for token in range(VOCAB) if token not in (EOS, MASK, 9)]  # 9 ends some answers, too


def decode(toy, prompt, places, **options):
    """Tokens of an answer and what came last."""
    own = alone(toy, Asked(prompt, options, places=places))
    return own.tokens, own.last


def random_places(rng):
    """An answer of which any place may be given: borders, ends, whole blocks, many gaps, one, or only gaps."""
    length, share = int(rng.integers(1, 19)), rng.choice([0.1, 0.5, 0.9])
    places = [int(token) if rng.random() < share else None for token in rng.choice(TEXT, length)]
    kind = rng.integers(5)
    if kind == 0:
        start = int(rng.integers(length))
        places = [int(token) for token in rng.choice(TEXT, length)]
        places[start:start + int(rng.integers(1, 7))] = [None] * len(places[start:start + int(rng.integers(1, 7))])
    elif kind == 1:
        places = [int(token) for token in rng.choice(TEXT, int(rng.integers(0, 3)) * N)] + places
    elif kind == 2:
        places += [int(token) for token in rng.choice(TEXT, N)]
    if None not in places:
        places[int(rng.integers(len(places)))] = None
    return places


def random_case(rng, attention, depth, shift):
    """Prompt, places and options of a request."""
    places = random_places(rng)
    alone = not shift and any(token is not None for token in places)
    prompt = rng.integers(0, VOCAB, int(rng.integers(0 if alone else 1, 10))).tolist()
    options = {
        "acceptance": str(rng.choice(["threshold", "fixed", "factor", "hierarchy", "credit"])),
        "steps": int(rng.choice([1, 2, 3, 32])), "threshold": float(rng.choice([0.0, 0.5, 0.95])),
        "factor": float(rng.choice([0.5, 1.5])), "low_threshold": float(rng.choice([0.2, 0.7])),
        "early_stop": bool(rng.integers(2)), "eos_id": int(rng.choice([EOS, EOS, -1, 9])),
        "seed": int(rng.integers(5))}
    if rng.random() < 0.5:
        options |= {"temperature": float(rng.choice([0.5, 2.0])), "top_k": int(rng.choice([0, 1, 3, 40])),
                    "top_p": float(rng.choice([1.0, 0.8]))}
    if rng.random() < 0.4 and options["acceptance"] != "credit":
        options |= {"edit_threshold": float(rng.choice([0.0, 0.3, 0.9])), "edit_passes": int(rng.choice([0, 1, 4])),
                    "penalty_lambda": float(rng.choice([0.0, 2.0]))}
    if attention == "full" and rng.random() < 0.5:
        options["block_length"] = int(rng.choice([1, 3, 8, 32]))
    return prompt, places, options


@pytest.mark.parametrize("attention, shift, caches", [
    ("full", False, {1: ("none", "prefix", "dual"), 2: ("none",)}),
    ("full", True, {1: ("none", "prefix", "dual"), 2: ("none",)}),
    ("block_causal", False, {1: ("none", "block", "reference"), 2: ("none", "block", "reference", "narrow")}),
    ("block_causal", True, {1: ("none",), 2: ("none",)})])
def test_the_loop_fills_as_a_naive_one(attention, shift, caches):
    """Depth 1: of caches that are approximations, what is cached does not change while it is."""
    rng = np.random.default_rng(7)
    for _ in range(40):
        depth = int(rng.integers(1, 3))
        edit_tokens = CONTROL if rng.random() < 0.3 else None
        prompt, places, options = random_case(rng, attention, depth, shift)
        want, reason = filled(Toy(attention, shift, depth, edit_tokens=edit_tokens), prompt, places, **options)
        for cache in caches[depth]:
            how = {"reference": {"schedule": "reference"}, "narrow": {}}.get(cache, {"cache": cache})
            limits = {"max_tokens": 8, "step_tokens": 4} if cache == "narrow" else {}
            toy = Toy(attention, shift, depth, edit_tokens=edit_tokens, **limits)
            tokens, last = decode(toy, prompt, places, **options, **how)
            case = (cache, depth, prompt, places, options)
            assert (tokens, last.finish_reason) == (want, reason), case
            given = [token for token in places[:len(tokens)] if token is not None]
            assert [t for t, p in zip(tokens, places, strict=False) if p is not None] == given, case
            assert last.statistics.given_tokens == len(given) and last.statistics.new_tokens == len(tokens), case
            if limits:
                assert max(i.input_ids.shape[1] for i in toy.seen) <= 8


@pytest.mark.parametrize("shift", [False, True])
def test_one_gap_is_the_argmax_fill(shift):
    """Of a full canvas: at threshold 0 of one forward, with one token per step the surest first."""
    rng, out = np.random.default_rng(3), [MASK, EOS]
    for _ in range(20):
        before, after, gap = (rng.choice(TEXT, int(n)).tolist() for n in rng.integers(1, 9, 3))
        toy, ids = Toy("full", shift), [*before, *[MASK] * len(gap), *after]
        masked = list(range(len(before), len(before) + len(gap)))
        at_once = [int(shares(row, out).argmax()) for row in logits_of(toy, ids, masked)]
        for option in ({"threshold": 0.0}, {"steps": 1}):
            tokens, last = decode(toy, before, [*[None] * len(gap), *after], cache="none", block_length=32, **option)
            assert tokens == at_once + after and last.finish_reason == "filled" and last.statistics.forwards == 1
        while masked:
            said = [(shares(row, [MASK])[int(shares(row, out).argmax())], int(shares(row, out).argmax()))
                    for row in logits_of(toy, ids, masked)]
            best = max(range(len(masked)), key=lambda i: (said[i][0], -i))
            ids[masked.pop(best)] = said[best][1]
        tokens, last = decode(toy, before, [*[None] * len(gap), *after], cache="none", block_length=32,
                              acceptance="fixed", steps=32)
        assert before + tokens == ids and last.statistics.forwards == len(gap)


def test_a_canvas_holds_what_is_given():
    """Random ids, drawn ones and the answer keep out of given places; these have no say in whether it is finished."""
    rng = np.random.default_rng(11)
    for _ in range(60):
        places, prompt = random_places(rng), rng.integers(0, VOCAB, int(rng.integers(1, 10))).tolist()
        options = {"steps": int(rng.integers(1, 8)), "entropy_bound": float(rng.choice([0.1, 2.0, 50.0])),
                   "confidence_threshold": float(rng.choice([0.0, 0.5, 9.0])), "seed": int(rng.integers(9)),
                   "stability_threshold": int(rng.integers(0, 3)), "eos_id": int(rng.choice([EOS, -1, 9]))}
        want = drafted(CanvasToy(), prompt, places, **options)
        for toy in (CanvasToy(), CanvasToy(C, C)):
            tokens, last = decode(toy, prompt, places, **options)
            assert (tokens, last.finish_reason) == want, (prompt, places, options)
            for inputs in toy.seen:
                for token, position in zip(inputs.input_ids[0], inputs.position_ids[0], strict=True):
                    there = places[position - len(prompt)] if 0 <= position - len(prompt) < len(places) else None
                    assert there in (None, token)


@pytest.mark.parametrize("toy, options", [
    (Toy(), {}), (Toy(), {"edit_threshold": 0.3, "edit_blocks": 1}), (Toy("full", True), {"cache": "dual"}),
    (Toy("full"), {"temperature": 0.8}), (CanvasToy(), {"entropy_bound": 2.0})])
def test_a_gap_alone_is_an_answer_of_that_length(toy, options):
    for prompt, length in (([5], 3), ([5, 6, 7, 8, 9], 12), ([3] * 8, 8)):
        plain = alone(toy, Asked(prompt, {**options, "max_new_tokens": length}))
        gap = alone(toy, Asked(prompt, options, places=[None] * length))
        assert gap.outcome(True) == plain.outcome(True) and plain.last.finish_reason in ("length", "eos")


KINDS = [("block_causal", False), ("full", False), ("full", True), ("canvas", False)]


def some(random, kind, most=8):
    """Requests, most of them with templates."""
    rows = []
    for _ in range(random.randint(1, most)):
        places = random_places(np.random.default_rng(random.randrange(10**6)))
        options = {"steps": random.randint(1, 8), "seed": random.randint(0, 9), "early_stop": random.random() < 0.5,
                   "schedule": random.choice(["merged", "reference"]), "eos_id": random.choice([None, -1, [EOS, 9]])}
        if kind == "canvas":
            options |= {"entropy_bound": random.choice([0.1, 2.0]), "confidence_threshold": random.choice([0.0, 9.0])}
        else:
            options |= {"acceptance": random.choice(ACCEPTANCES), "threshold": random.choice([0.3, 0.95])}
            if random.random() < 0.4:
                options |= {"temperature": 1.0, "top_k": random.choice([0, 3])}
            if random.random() < 0.5:
                options |= {"edit_threshold": random.choice([0.1, 0.5]), "edit_passes": random.randint(0, 3)}
                if kind == "block_causal":
                    options["edit_blocks"] = random.choice([0, 1, 3])
            if kind == "full":
                options["cache"] = random.choice(["none", "prefix", "dual"])
        template = places if random.random() < 0.8 else None
        if template is None:
            options["max_new_tokens"] = len(places)
        rows.append(Asked(random.choices(range(VOCAB), k=random.randint(1, 3 * N)), options, random.randint(0, 3),
                          None if options.get("edit_blocks") else random.choice([None, None, random.choice(TEXT)]),
                          template))
    return rows


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(KINDS))
def test_an_answer_is_that_of_the_request_alone(seed, kind):
    """Rows with and without templates, in any phase; some are cancelled; a text may end in what is given."""
    def toy():
        return CanvasToy() if kind[0] == "canvas" else Toy(*kind)

    random, rows = Random(seed), some(Random(seed), kind[0])
    live(JoiningBatch(toy(), random.randint(1, 4)), rows, random, random.choice([0, 0.1, 0.3]))
    check(rows, toy())
    assert all(len(asked.tokens) == asked.last.statistics.new_tokens for asked in rows)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32))
def test_narrow_forwards_of_an_engine(seed):
    """Whole blocks that are given enter the cache in chunks, as a prompt does."""
    random = Random(seed)
    width = N * random.randint(1, 4)
    fast = random.choice([None, N, min(2 * N + 1, width)])
    rows, toy = some(random, "block_causal"), Toy(max_tokens=width, step_tokens=fast)
    for asked in rows:
        if "edit_blocks" in asked.options:
            asked.options["edit_blocks"] = random.randint(0, width // N - 1)
    live(JoiningBatch(toy, random.randint(1, 4)), rows, random)
    assert all(inputs.input_ids.shape[1] <= width for inputs in toy.seen)
    check(rows, Toy(max_tokens=width), prefills=False)


@pytest.mark.parametrize("toy", [Toy(), CanvasToy()])
def test_no_forward_is_wider_than_those_of_a_prompt(toy):
    """1 200 given tokens in the middle of an answer enter the cache in pieces of a prefill."""
    decode(toy, [5] * 6, [None, *[8] * 1200, None], eos_id=-1)
    widths = [inputs.input_ids.shape[1] for inputs in toy.seen]
    assert max(widths) <= PREFILL_TOKENS + N and sum(width > 100 for width in widths) == 3


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32))
def test_open_blocks_see_what_is_given_with_every_cache(seed):
    """With `edit_blocks` windows go over given blocks; the block cache stays exact."""
    random = Random(seed)
    for asked in some(random, "block_causal", 3):
        options = {**asked.options, "edit_threshold": 0.2, "edit_blocks": random.randint(1, 3)}
        plain, *cached = (decode(toy, asked.prompt, asked.places or [None] * 9, **{**options, **how})
                          for toy, how in ((Toy(), {"cache": "none"}), (Toy(), {}), (Toy(), {"schedule": "reference"}),
                                           (Toy(max_tokens=16, step_tokens=4), {})))
        for one in cached:
            assert one[0] == plain[0] and one[1].finish_reason == plain[1].finish_reason
            assert one[1].statistics.edits == plain[1].statistics.edits


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(KINDS))
def test_no_step_touches_what_is_given(seed, kind):
    """What watchers see of each forward."""
    for asked in some(Random(seed), kind[0], 3):
        if asked.places is None:
            continue
        toy, seen = CanvasToy() if kind[0] == "canvas" else Toy(*kind), []
        batch = JoiningBatch(toy, 1)
        batch.add(asked.prompt, Way(toy, DecodeSettings(**asked.options), template=made(asked.places)),
                  watch=seen.append)
        while len(batch):
            batch.step()
        for one in seen:
            for i, token in enumerate(one.token_ids):
                place = asked.places[one.start + i]
                assert place is None or (token == place == one.candidates[i] and i not in one.new)
            upto = asked.places[:one.start + len(one.token_ids)]
            assert one.given_tokens == sum(place is not None for place in upto)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32))
def test_blocks_that_are_given_are_kept_for_later_prompts(seed):
    """Prompts and given text out of the same blocks: what one row left, another takes."""
    random = Random(seed)
    blocks = [random.choices(TEXT, k=N) for _ in range(2)]
    batch = JoiningBatch(Toy(), 2, prefix_cache=random.choice([3, 20]) * N * ToyCache.token_bytes)
    rows = [Asked(prompt := [token for one in random.choices(blocks, k=random.randint(1, 4)) for token in one], {},
                  places=[*[None] * (random.randint(0, 2) * len(prompt[:1])), *random.choice(blocks), *blocks[0], None,
                          *random.choices(TEXT, k=random.randint(0, 5))]) for _ in range(6)]
    live(batch, rows, random, 0)
    for asked in rows:
        own = alone(Toy(), asked)
        assert (asked.tokens, asked.last.finish_reason) == (own.tokens, own.last.finish_reason)


def test_a_given_block_is_taken_by_the_next_prompt():
    first, second = [5, 6, 7, 8], [9, 10, 11, 12]
    batch = JoiningBatch(Toy(), 1, prefix_cache="1M")
    for prompt, places, taken in ((first, [*second, *first, None], 0), ([*first, *second, *first, 3], [None], 12)):
        rows = [Asked(prompt, {}, places=places)]
        live(batch, rows, Random(0), 0)
        assert rows[0].last.statistics.prefix_tokens == taken
        assert rows[0].tokens == alone(Toy(), rows[0]).tokens


@pytest.mark.parametrize("attention", ["full", "block_causal"])
@pytest.mark.parametrize("extra", [{}, {"temperature": 1.5}, {"edit_threshold": 0.2, "edit_passes": 4}])
def test_what_is_barred_is_so_by_candidates_and_by_logits(attention, extra, monkeypatch):
    """End tokens, the pad, and the control tokens of models that edit."""
    rng = np.random.default_rng(5)
    cases = [([int(rng.integers(3, VOCAB))], [*[None] * int(rng.integers(1, 12)), 8]) for _ in range(12)]
    ends = {"eos_id": [EOS, 10, 11, 12, 13], "top_k": VOCAB}

    def answers(**more):
        toy = Toy(attention, edit_tokens=CONTROL)
        found = [decode(toy, *case, cache="none", **{**ends, **extra, **more})[0] for case in cases]
        return found, {inputs.want_logits for inputs in toy.seen}

    by_candidates, asked = answers()
    assert asked == {False}
    assert not {EOS, 10, 11, 12, 13, CONTROL.delete, CONTROL.split} & {token for one in by_candidates for token in one}
    with monkeypatch.context() as patched:
        patched.setattr("dmoe_export.decoding.outcome.MOST", 3)
        patched.setattr("dmoe_export.decoding.sampling.MOST", 3)
        assert answers() == (by_candidates, {True})
    if "temperature" in extra:
        assert answers(top_k=0) == (by_candidates, {True})
    assert any(token == EOS for case in cases for token in
               decode(Toy(attention), case[0], [None] * 12, eos_id=-1, cache="none")[0])


@pytest.mark.parametrize("toy", [Toy(), CanvasToy()])
def test_a_vocabulary_of_ends_alone_is_refused(toy):
    """Tiny vocabularies: with one token left, that is the answer."""
    all_but = [token for token in range(VOCAB) if token != 8]
    assert decode(toy, [5], [None, None, 8], eos_id=all_but)[0] == [8, 8, 8]
    all_but_the_pad = [token for token in range(VOCAB) if token != toy.description.pad_id]
    with pytest.raises(RequestError, match="No token is left for the gaps of the template"):
        Way(toy, DecodeSettings(eos_id=all_but_the_pad), template=made([None, toy.description.pad_id]))


def ended(toy, places, prompt=(5, 6), **options):
    return decode(toy, list(prompt), places, **options)[1]


def test_finish_reasons():
    """filled: what is given came last; length: a gap did; eos: the model ended in such a gap, and nowhere else."""
    toy = Toy()
    assert ended(toy, [None, 8], eos_id=-1).finish_reason == "filled"
    assert ended(toy, [8, None], eos_id=-1).finish_reason == "length"
    reasons = {ended(toy, [8, *[None] * 40], prompt=[token]).finish_reason for token in range(3, 9)}
    assert "eos" in reasons
    assert all(ended(toy, [*[None] * 40, 8], prompt=[token]).finish_reason == "filled" for token in range(3, 9))


@pytest.mark.parametrize("toy", [Toy(), Toy("full"), CanvasToy()])
def test_nothing_is_computed_behind_the_last_gap(toy):
    """Blocks that are given behind it are part of the answer, and cost nothing; nor do places behind the answer."""
    near, far = (decode(toy, [5] * 3, [None, *[8] * length], eos_id=-1) for length in (1, 30))
    assert len(far[0]) == 31 and far[1].statistics.blocks == 1
    if toy.description.attention != "full":
        assert far[0][:2] == near[0] and far[1].statistics.forwards == near[1].statistics.forwards
    assert far[1].statistics.given_tokens == 30 and far[1].statistics.tokens_per_forward <= 1


@pytest.mark.parametrize("toy", [Toy(), Toy("full"), CanvasToy()])
def test_an_answer_that_is_cut_short_keeps_what_is_given_before(toy):
    """Two given blocks, then a gap; cancelled before the first step and after each."""
    n = toy.description.canvas.length if toy.description.canvas else N
    places = [*[8] * (2 * n), *[None] * (2 * n), 9]
    for steps in range(4):
        batch = JoiningBatch(toy, 1)
        row = batch.add([5] * n, Way(toy, DecodeSettings(steps=2, **({} if n == C else {"acceptance": "fixed"})),
                                     template=made(places)))
        tokens, done = [], []
        for step in range(30):
            if step == steps:
                batch.cancel(row)
            done += batch.step()
            if not len(batch):
                break
        tokens = [token for one in done for token in one.token_ids]
        assert done[-1].finish_reason == "cancelled"
        assert tokens[:2 * n] == [8] * (2 * n) and len(tokens) in (2 * n, 3 * n)
        assert done[-1].statistics.given_tokens == 2 * n


def test_a_stop_string_in_given_text_ends_the_answer():
    """Of what is too much, given tokens are no tokens of the answer either."""
    asked = Asked([5] * N, {"eos_id": -1}, ends_with=8, places=[None, 8, 9, 9, *[None] * N, 10])
    own = alone(Toy(), asked)
    assert own.last.finish_reason == "stop" and own.tokens[1:] == [8]
    assert (own.last.statistics.new_tokens, own.last.statistics.given_tokens) == (2, 1)


@pytest.mark.parametrize("toy, prompt, places, seen", [
    (Toy("full"), 3, [None, 8, None, 8, 8, *[8] * 20], [23, 22]),  # all that is behind it
    (Toy(), 3, [None, 8, None, 8, 8, *[8] * 20], [0, 2]),  # places 4 … 7 are a block
    (CanvasToy(), 3, [None, 8, None, 8, 8, *[8] * 20], [4, 3]),  # canvases of 6 begin with the answer
])
def test_how_much_given_text_a_gap_sees(toy, prompt, places, seen):
    """And nothing more: other text where it does not look changes nothing."""
    way = Way(toy, DecodeSettings(eos_id=-1), template=made(places))
    assert way.template.in_sight(prompt, lambda position: way.sight(prompt, position)) == seen
    for gap, many in zip([i for i, token in enumerate(places) if token is None], seen, strict=True):
        behind = [i for i in range(gap + 1, len(places)) if places[i] is not None]
        for number, place in enumerate(behind):
            other = [20 if i == place else token for i, token in enumerate(places)]
            tokens, changed = (decode(toy, [5] * prompt, one, eos_id=-1, steps=1)[0][gap] for one in (places, other))
            if number >= many:
                assert tokens == changed
        others = [20 if token == 8 else token for token in places]
        if many:
            assert len({decode(toy, [5] * prompt, [token and filler for token in others], eos_id=-1, steps=1)[0][gap]
                        for filler in range(10, 20)}) > 1
