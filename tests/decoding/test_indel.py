"""Editing that inserts and deletes, beside what it must leave alone; control tokens of models that could, too."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from joining import Asked, check, live
from scripted import Scripted
from toy_backend import EOS, MASK, VOCAB, N, Toy, decode

from dmoe_export.decoding import indel
from dmoe_export.decoding.batch import JoiningBatch
from dmoe_export.decoding.loop import BlockDiffusion
from dmoe_export.decoding.settings import SCHEDULES, DecodeSettings
from dmoe_export.description import EditTokens
from dmoe_export.errors import NotFiniteError, RequestError

DELETE, SPLIT = 21, 22
EDIT = EditTokens(delete=DELETE, split=SPLIT)
INDEL = {"edit_threshold": 0.3, "insert_delete": True, "threshold": 0.6}

PROMPTS = st.lists(st.lists(st.integers(3, 22), min_size=1, max_size=10), min_size=1, max_size=3)
OPTIONS = st.fixed_dictionaries({
    "max_new_tokens": st.integers(1, 14), "steps": st.sampled_from([1, 2, 4, 9]),
    "threshold": st.sampled_from([0.0, 0.6, 1.0]), "edit_threshold": st.sampled_from([0.0, 0.5]),
    "edit_passes": st.sampled_from([0, 1, 4, 16]), "temperature": st.sampled_from([0.0, 0.0, 1.5]),
    "top_k": st.sampled_from([0, 5]), "eos_id": st.sampled_from([None, -1]), "seed": st.integers(0, 5)})


def toy(**options):
    return Toy(edit_tokens=EDIT, **options)


def counts(last):
    return [(s.edits, s.inserted, s.deleted, s.new_tokens, s.blocks) for s in (one.statistics for one in last)]


@settings(max_examples=60, deadline=None)
@given(PROMPTS, OPTIONS)
def test_caches_and_schedules_give_the_same(prompts, options):
    """A look-over that changes nothing is the commit, one that moves places is not: the toy notices either mistake."""
    tokens, last = decode(toy(), prompts, insert_delete=True, cache="none", **options)
    for schedule in SCHEDULES:
        cached = decode(toy(), prompts, insert_delete=True, schedule=schedule, **options)
        assert cached[0] == tokens and counts(cached[1]) == counts(last)
        assert [one.finish_reason for one in cached[1]] == [one.finish_reason for one in last]
        assert [one.statistics.forwards_by_phase["denoise"] for one in cached[1]] == [
            one.statistics.forwards_by_phase["full"] for one in last]


@settings(max_examples=60, deadline=None)
@given(st.data(), PROMPTS, OPTIONS, st.sampled_from(["block_causal", "full"]))
def test_what_must_hold_of_every_answer(data, prompts, options, attention):
    """Neither mask nor control tokens in it, as long as asked for, in a bounded number of steps."""
    cache = data.draw(st.sampled_from(["auto", "none"]))
    tokens, last = decode(toy(attention=attention), prompts, insert_delete=True, cache=cache, **options)
    for prompt, answer, end in zip(prompts, tokens, last, strict=True):
        assert not {MASK, DELETE, SPLIT} & set(answer)
        s, length = end.statistics, len(prompt) % N * (attention != "full") + options["max_new_tokens"]
        assert len(answer) == s.new_tokens <= options["max_new_tokens"]
        assert (end.finish_reason == "length") == (len(answer) == options["max_new_tokens"])
        steps = s.forwards_by_phase["denoise"] + s.forwards_by_phase["full"]
        assert steps <= -(-length // N) * (min(N, options["steps"]) + options["edit_passes"] + 1)


@settings(max_examples=60, deadline=None)
@given(PROMPTS, OPTIONS, st.sampled_from([
    {}, {"edit_threshold": None}, {"edit_threshold": None, "acceptance": "credit"}, {"penalty_lambda": 2.0},
    {"acceptance": "factor"}]))
def test_without_it_control_tokens_are_never_chosen(prompts, options, other):
    """Of a bundle that has them: plainly, by joint editing, and while sampling."""
    for answer in decode(toy(), prompts, **{**options, **other})[0]:
        assert not {MASK, DELETE, SPLIT} & set(answer)


@settings(max_examples=40, deadline=None)
@given(PROMPTS, OPTIONS)
def test_candidates_are_as_good_as_logits(prompts, options):
    """The same answers, whichever a forward gives."""
    backend, other = toy(), toy()
    tokens, last = decode(backend, prompts, insert_delete=True, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indel, "MOST", 0)
        all_of_them = decode(other, prompts, insert_delete=True, **options)
    assert all_of_them[0] == tokens and counts(all_of_them[1]) == counts(last)
    wants = options["temperature"] > 0 and not options["top_k"]
    assert [inputs.want_logits for inputs in backend.seen] == [
        wants and bool((inputs.logit_rows >= 0).any()) for inputs in backend.seen]
    assert any(inputs.want_logits for inputs in other.seen)


@settings(max_examples=40)
@given(st.integers(0, 2**32))
def test_rows_of_any_settings_share_a_batch(seed):
    """Joint, plain, drawn and inserting rows together, with stop texts and rows that leave: each answer is its own."""
    random = Random(seed)
    kinds = [INDEL, {**INDEL, "edit_passes": 0}, {**INDEL, "temperature": 1.0, "top_k": 4},
             {**INDEL, "temperature": 1.0}, {"edit_threshold": 0.2}, {"edit_threshold": 0.2, "penalty_lambda": 3.0},
             {}, {"temperature": 1.0, "top_k": 3}, {"acceptance": "credit"}]
    rows = [Asked(random.choices(range(3, 23), k=random.randint(1, 3 * N)),
                  {"max_new_tokens": random.randint(1, 3 * N), "eos_id": random.choice([None, -1]),
                   "cache": random.choice(["auto", "none"]), "seed": random.randint(0, 9), **random.choice(kinds)},
                  random.randint(0, 3), random.choice([None, random.randrange(VOCAB)]))
            for _ in range(random.randint(1, 8))]
    live(JoiningBatch(toy(), random.randint(1, 4), prefix_cache=random.choice([None, 4000])), rows, random,
         random.choice([0, 0.1]))
    for asked in rows:  # what is taken from a store saves prefills
        assert asked.last.error is None
    check(rows, toy(), prefills=False)


def scripted(*steps, n=4, **options):
    """`steps[forward][position]` = the token that is sure there, or (token, share of it); the last goes on."""

    def says(forward, positions, ids):
        logits, now = np.zeros((len(positions), VOCAB)), steps[min(forward, len(steps) - 1)]
        for row, position in zip(logits, positions.tolist(), strict=True):
            told = now.get(position, 9)
            token, share = told if isinstance(told, tuple) else (told, 0.99)
            row[token] = np.log(share / (1 - share) * (VOCAB - 1))
        return logits

    return Scripted(says, n, VOCAB, MASK, (EOS,), (DELETE, SPLIT), **options)


def steps_of(backend, prompt, **options):
    """The row's places after each forward, −1 masked; the last word; what a watcher saw."""
    batch, seen, blocks, done = JoiningBatch(backend, 1), [], [], []
    handle = batch.add(prompt, DecodeSettings(**{**INDEL, **options}), watch=seen.append)
    while not done or done[-1].finish_reason is None:
        assert not done or done[-1].error is None
        done += batch.step()
        row = handle.row
        blocks.append(np.where(row.masked, -1, row.canvas).tolist())
    return blocks, done, seen


def test_places_move_behind_the_prompt_and_what_was_said_moves_with_them():
    backend = scripted({2: 10, 3: (11, 0.5), 4: (12, 0.5), 5: 13, 6: (14, 0.4), 7: 15},  # threshold 0.6: 2, 5 and 7
                       {2: SPLIT, 3: (11, 0.5), 4: DELETE, 5: 13, 6: (14, 0.4), 7: 15},
                       {2: 20, 3: 10, 4: 11, 5: 13, 6: 14, 7: 15}, n=8)
    blocks, done, seen = steps_of(backend, [DELETE, 7], max_new_tokens=6, eos_id=-1, threshold=0.6)
    assert blocks[0] == [DELETE, 7, 10, -1, -1, 13, -1, 15]
    assert blocks[1] == [DELETE, 7, -1, 10, -1, 13, -1, 15]  # SPLIT at 2, and place 4 is no more
    assert blocks[2] == [DELETE, 7, 20, 10, 11, 13, 14, 15] and done[-1].token_ids == blocks[2][2:]
    s = done[-1].statistics
    assert (s.inserted, s.deleted, s.edits) == (1, 1, 0)
    assert len(blocks) == 4  # the last found nothing to change
    assert seen[1].token_ids == [-1, 10, -1, 13, -1, 15]
    assert seen[1].candidates == [-1, 10, 11, 13, 14, 15]  # of the new place nothing is known yet
    assert seen[1].confidence[0] == 0 and seen[1].confidence[2] == pytest.approx(0.5)
    assert seen[1].new == [0, 1]


def test_a_block_is_cut_and_filled_at_its_end():
    first = {4: 10, 5: 11, 6: 12, 7: 13}
    blocks, done, _ = steps_of(scripted(first, {**first, 4: SPLIT}, {4: 20, 5: 10, 6: 11, 7: 12}), [7] * 4,
                               max_new_tokens=4, eos_id=-1)
    assert [block[4:] for block in blocks] == [[10, 11, 12, 13], [-1, 10, 11, 12], [20, 10, 11, 12], [20, 10, 11, 12]]
    blocks, done, _ = steps_of(scripted(first, {**first, 4: DELETE}, {4: 11, 5: 12, 6: 13, 7: 20}), [7] * 4,
                               max_new_tokens=4, eos_id=-1)
    assert [block[4:] for block in blocks] == [[10, 11, 12, 13], [11, 12, 13, -1], [11, 12, 13, 20], [11, 12, 13, 20]]
    assert done[-1].statistics.deleted == 1


def test_only_finished_blocks_leave_and_an_end_that_moves_away_is_none():
    """An EOS in the first block is deleted; the second block keeps one, at whose place the answer ends."""
    first = {4: 10, 5: EOS, 6: 12, 7: 13, 8: 14, 9: EOS, 10: 16, 11: 17}
    second = {**first, 5: DELETE}
    third = {4: 10, 5: 12, 6: 13, 7: 18}
    blocks, done, _ = steps_of(scripted(first, second, third, third, {8: 14, 9: EOS, 10: 16, 11: 17}), [7] * 4,
                               max_new_tokens=12)
    assert [one.token_ids for one in done] == [[10, 12, 13, 18], [14]]
    assert done[-1].finish_reason == "eos" and done[-1].statistics.new_tokens == 5
    assert blocks[0][4:8] == [10, EOS, 12, 13]


def test_the_answer_is_cut_at_its_length_though_places_move_beyond():
    first = {4: 10, 5: 11, 6: 12, 7: 13}
    _, done, _ = steps_of(scripted(first, {**first, 4: DELETE}, {4: 11, 5: 12, 6: 13, 7: 20}), [7] * 4,
                               max_new_tokens=2, eos_id=-1)
    assert done[-1].token_ids == [11, 12] and done[-1].finish_reason == "length"


def test_no_edit_passes_clean_up_as_they_fill():
    blocks, done, _ = steps_of(scripted({4: DELETE, 5: 11, 6: SPLIT, 7: 13}), [7] * 4, max_new_tokens=4, eos_id=-1,
                               edit_passes=0)
    assert len(blocks) == 1 and done[-1].token_ids == [0, 11, 0, 13]  # the best that is neither, of equal ones
    assert done[-1].statistics.deleted == done[-1].statistics.inserted == 0


def test_a_model_that_never_rests_is_ended_by_the_budget():
    flip = [{p: (10 if (f + p) % 2 else SPLIT) for p in range(4, 8)} for f in range(40)]
    blocks, done, _ = steps_of(scripted(*flip), [7] * 4, max_new_tokens=4, eos_id=-1, edit_passes=5)
    assert len(blocks) <= 4 + 5 + 1 and not {SPLIT, DELETE, MASK} & set(done[-1].token_ids)


def test_numbers_that_are_not_finite_end_the_row():
    class Bad(Toy):
        def forward(self, inputs, cache):
            outputs = super().forward(inputs, cache)
            if outputs.candidates is not None:
                outputs.candidates.mask_logits[:] = np.inf
            return outputs

    for options in (INDEL, {"edit_threshold": 0.5}):
        with pytest.raises(NotFiniteError, match="Prompt 0 gets no answer"):
            decode(Bad(edit_tokens=EDIT), [[5, 6]], max_new_tokens=8, **options)


@pytest.mark.parametrize(("options", "said"), [
    ({"insert_delete": True}, "insert_delete belongs to editing; give edit_threshold (such as 0), too."),
    ({"penalty_lambda": 1.0}, "penalty_lambda belongs to editing; give edit_threshold (such as 0), too."),
    ({**INDEL, "acceptance": "factor"},
     "insert_delete decides by acceptance threshold, not factor; leave one of them out."),
    ({**INDEL, "penalty_lambda": 1.0}, "insert_delete knows no penalty_lambda; leave one of them out."),
    (INDEL, "insert_delete needs the ids of the model's control tokens, and BUNDLE has none; export it again with "
            "--edit-tokens DELETE,SPLIT, or leave insert_delete out.")])
def test_what_is_refused(options, said):
    with pytest.raises(RequestError) as error:
        BlockDiffusion(Toy(), DecodeSettings(**options))
    assert str(error.value) == said
