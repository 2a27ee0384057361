"""Templates of models that insert and delete: gaps shrink and grow within their range, and what is given stays."""

from __future__ import annotations

from collections import Counter
from random import Random

import numpy as np
import pytest
from salient_helpers import make_model
from scripted import Scripted
from toy_backend import EOS, MASK, VOCAB, N, Toy

from dmoe_export.decoding import indel
from dmoe_export.decoding.batch import JoiningBatch
from dmoe_export.decoding.loop import BlockDiffusion
from dmoe_export.decoding.row import Row
from dmoe_export.decoding.settings import SCHEDULES, DecodeSettings
from dmoe_export.decoding.template import OPEN, Gap, template_of
from dmoe_export.decoding.way import Way
from dmoe_export.description import EditTokens
from dmoe_export.errors import RequestError
from dmoe_export.model.backend import EagerBackend

DELETE, SPLIT = 21, 22
EDIT = EditTokens(delete=DELETE, split=SPLIT)
INDEL = {"edit_threshold": 0.3, "insert_delete": True, "threshold": 0.6}


class Wild(Toy):
    """Wants to delete, insert and end more often than chance has it."""

    def __init__(self, likes=(6.0, 6.0, 3.0), **options):
        super().__init__(edit_tokens=EDIT, **options)
        self.likes = likes

    def says(self, seed):
        logits = super().says(seed)
        logits[[DELETE, SPLIT, EOS]] += self.likes
        return logits


def template(*parts):
    return template_of(parts, lambda text: [])


def answer(backend, prompt, parts, look=lambda row: None, **options):
    """The tokens, the row at its end, and how many steps it took."""
    batch = JoiningBatch(backend, 1)
    way = Way(backend, DecodeSettings(**{**INDEL, **options}), template=template(*parts))
    handle, tokens = batch.add(prompt, way), []
    while len(batch):
        for done in batch.step():
            if done.error:
                raise done.error
            tokens += done.token_ids
        look(handle.row)
    return tokens, handle.row


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


def seen_by(backend, prompt, parts, **options):
    """The answer's places after each forward, −1 masked; the tokens, the row."""
    seen = []
    tokens, row = answer(backend, prompt, parts, lambda row: seen.append(
        np.where(row.masked, -1, row.canvas)[row.prompt_length:row.end].tolist()), **options)
    return seen, tokens, row


def test_a_gap_loses_places_and_what_follows_moves_up_in_later_blocks_too():
    backend = scripted({5: 10, 6: DELETE, 7: DELETE}, {5: 10, 9: 13, 10: 14})
    parts = [[3], Gap(1, 3), [4, 5, 6], Gap(2), [7]]  # prompt of 4: positions 4; 5 6 7; 8 9 10; 11 12; 13
    seen, tokens, row = seen_by(backend, [8] * 4, parts)
    assert seen[0] == [3, 10, 4, 5, 6, -1, -1, 7]  # two places less: 4 and 5 came into the block
    assert tokens == [3, 10, 4, 5, 6, 13, 14, 7] and row.finish_reason == "filled"
    assert row.answer_gaps() == ((1, 2), (5, 7))
    assert row.statistics.deleted == 2 and row.statistics.given_tokens == 5 and row.statistics.new_tokens == 8


def test_no_more_than_the_range_allows_and_the_surest_first():
    backend = scripted({4: (DELETE, 0.7), 5: (DELETE, 0.9), 6: (DELETE, 0.8), 7: DELETE}, {}, n=8)
    seen, tokens, row = seen_by(backend, [8] * 4, [Gap(1, 3), [5]])  # position 7 is given
    assert seen[0] == [-1, 5] and row.statistics.deleted == 2  # of 4, 5 and 6 the last two
    assert seen[1] == tokens == [9, 5]


def test_a_gap_grows_again_and_pushes_the_given_into_the_next_block():
    backend = scripted({4: 10, 5: DELETE, 6: 12}, {4: SPLIT, 5: SPLIT},
                       {4: 15, 5: 10, 6: 12})
    seen, tokens, row = seen_by(backend, [8] * 4, [Gap(1, 3), [5, 6], Gap(1), [7]])
    assert seen[0] == [10, 12, 5, 6, -1, 7]
    assert seen[1] == [-1, 10, 12, 5, 6, -1, 7]  # room for one: of equally sure ones the first
    assert tokens == [15, 10, 12, 5, 6, 9, 7] and row.answer_gaps() == ((0, 3), (5, 6))
    assert (row.statistics.inserted, row.statistics.deleted) == (1, 1)


def test_a_gap_of_one_length_takes_neither_and_given_places_are_never_written():
    first = {4: DELETE, 5: SPLIT, 6: DELETE, 7: 13}
    seen, tokens, row = seen_by(scripted(first, first, {**first, 5: 11}), [8] * 4, [Gap(2), [5, 6]])
    assert seen[:2] == [[0, -1, 5, 6], [0, 0, 5, 6]]  # the best that is neither, of equal ones, which is not sure
    assert tokens == [0, 11, 5, 6]  # 4 stays what it is, 5 is edited
    assert row.statistics.deleted == row.statistics.inserted == 0 and row.statistics.edits == 1


def test_no_end_where_something_is_given_behind():
    first = {4: EOS, 5: 11, 7: 10, 8: EOS, 9: 12}
    _, tokens, row = seen_by(scripted(first), [8] * 4, [Gap(1, 2), [5], Gap(3)])
    assert tokens == [0, 11, 5, 10] and row.finish_reason == "eos"  # the place behind ends it
    assert row.answer_gaps() == ((0, 2), (3, 4))


def test_behind_what_is_given_the_block_is_cut_and_filled_as_without_a_template():
    """The given place stays where it is, and the gap is as long as it was."""
    first = {8: 10, 10: 11, 11: 12, 12: 13, 13: 14, 14: 15, 15: 16}
    for token, wanted in ((SPLIT, [10, 5, -1, 11, 12, 13, 14, 15]), (DELETE, [10, 5, 12, 13, 14, 15, 16, -1])):
        seen, tokens, row = seen_by(scripted(first, {**first, 10: token}, first, n=8), [8] * 8, [Gap(1), [5], Gap(6)],
                                    eos_id=-1)
        assert seen[1] == wanted and tokens == [10, 5, *range(11, 17)]
        assert row.answer_gaps() == ((0, 1), (2, 8)) and row.finish_reason == "length"


def test_a_template_that_gives_nothing_decodes_as_none():
    random = Random(3)
    for seed in range(12):
        backend, options = Wild(), {**INDEL, "seed": seed, "edit_passes": random.choice([0, 2, 9])}
        prompt, places = random.choices(range(3, 20), k=random.randint(1, 9)), random.randint(1, 13)
        batch = BlockDiffusion(backend, DecodeSettings(max_new_tokens=places, **options))
        plain = [token for block in batch.decode([prompt]) for token in block.token_ids]
        assert answer(backend, prompt, [Gap(places)], **options)[0] == plain


def test_a_row_moves_as_a_list_of_its_places_does():
    """The definition: places are taken out and put in one by one, behind the last given one inside the block alone."""
    random, moved = Random(5), 0
    for _ in range(200):
        parts, before = drawn_parts(random), random.randint(1, 6)
        backend = random.choice([Toy(edit_tokens=EDIT), Toy(attention="full", edit_tokens=EDIT)])
        made = template(*parts)
        row = Row(0, [3] * before, DecodeSettings(max_new_tokens=len(made.token_ids)), backend.description, N, 0, made)
        names = np.arange(100, 100 + len(row.canvas)).tolist()
        row.canvas[:] = names
        row.masked[:] = False
        start, stop = row.span.start, row.span.stop
        where = [next((g for g, (a, b) in enumerate(row.spans.tolist()) if a <= p < b), None)
                 for p in range(len(names))]
        times = [1 if row.given[p] or p < before else random.choice([0, 1, 1, 2])
                 for p in range(start, stop)]
        kept = []
        for p in range(min(max(start, row.closed), stop)):
            many = 1 if p < start else times[p - start]
            kept += [(MASK, where[p])] * (many - 1) + [(names[p], where[p])] * (many > 0)
        behind = []
        for p in range(max(start, row.closed), stop):
            behind += [MASK] * (times[p - start] - 1) + [names[p]] * (times[p - start] > 0)
        free = max(0, stop - max(start, row.closed))
        behind = (behind + [MASK] * free)[:free]
        want = [name for name, _ in kept] + behind + names[stop:]
        given, closed, end = row.given.sum(), row.closed, row.end
        if len(want) - len(names) > len(names) - end:
            continue  # a gap that grows has shrunk before, so nothing falls off the canvas
        row.move(np.array(times))
        moved += 1
        assert row.canvas.tolist() == (want + [MASK] * len(names))[:len(names)]
        assert row.masked.tolist() == (row.canvas == MASK).tolist()
        shift = len(kept) - min(max(start, closed), stop)
        assert (row.closed - closed, row.end - end, row.given.sum()) == (shift, shift, given)
        assert row.shifted == (shift != 0)
        for g, (a, b) in enumerate(row.spans.tolist()):
            if a < row.closed:
                assert b - a == sum(place == g for _, place in kept) + sum(
                    place == g for place in where[stop:] if closed > stop)
                assert not row.given[a:b].any()
        assert row.given[:row.closed].sum() == given and (row.closed == before or row.given[row.closed - 1])
    assert moved > 150


def drawn_parts(random):
    """A gap at least; ranges only where something is given behind them."""
    parts = []
    for _ in range(random.randint(1, 4)):
        most = random.randint(1, 6)
        if random.random() < 0.5:
            parts.append(random.choices(range(3, 20), k=random.randint(1, 4)))
        parts.append(random.choice([Gap(most), Gap(random.randint(1, most), most)]))
    if random.random() < 0.3:
        return [*parts, Gap(1), [random.randint(3, 19)] * random.randint(1, 6)] + [Gap(5)] * random.randint(0, 1)
    return [*parts, random.choices(range(3, 20), k=random.randint(1, 4))]


def drawn_options(random):
    return {"steps": random.choice([1, 2, 4, 9]), "threshold": random.choice([0.0, 0.6, 1.0]),
            "edit_threshold": random.choice([0.0, 0.5]), "edit_passes": random.choice([0, 1, 4, 16]),
            "temperature": random.choice([0.0, 0.0, 1.5]), "top_k": random.choice([0, 5]),
            "eos_id": random.choice([None, -1]), "seed": random.randint(0, 9)}


def check(parts, tokens, row):
    """What is given comes out in order and as it was, and gaps have a length of their range."""
    spans, gaps, ids = row.answer_gaps(), [part for part in parts if isinstance(part, Gap)], list(tokens)
    given = [token for part in parts if not isinstance(part, Gap) for token in part]
    assert not {MASK, DELETE, SPLIT} & set(tokens)
    at_end = isinstance(parts[-1], Gap)
    for start, stop in reversed(spans):
        if row.settings.eos_id is None and (not at_end or stop <= row.closed - row.prompt_length):
            assert EOS not in ids[start:stop]
        del ids[start:stop]
    assert ids == given and [a <= b for a, b in spans] == [True] * len(gaps)
    for i, (gap, (start, stop)) in enumerate(zip(gaps, spans, strict=True)):
        last = at_end and i == len(gaps) - 1
        assert (0 if last else gap.fewest) <= stop - start <= gap.places, (gap, start, stop)
    if at_end:
        assert (row.finish_reason == "length") == (spans[-1][1] - spans[-1][0] == gaps[-1].places)
    else:
        assert row.finish_reason == "filled"


def outcome(tokens, row):
    s = row.statistics
    return tokens, row.answer_gaps(), row.finish_reason, s.edits, s.inserted, s.deleted, s.given_tokens, s.blocks


def test_any_template_keeps_what_it_gives_with_every_cache():
    """Of models that insert and delete as chance has it; the toy notices a cache that holds what has moved."""
    random, inserted, deleted, shorter = Random(8), 0, 0, 0
    for _ in range(100):
        parts, options = drawn_parts(random), drawn_options(random)
        likes = random.choice([(6.0, 6.0, 3.0), (9.0, 2.0, 0.0), (5.0, 9.0, 5.0)])
        prompt = random.choices(range(3, 20), k=random.randint(1, 9))
        attention = random.choice(["block_causal", "block_causal", "full"])
        found = [answer(Wild(likes, attention=attention), prompt, parts, cache="none", **options)]
        tokens, row = found[0]
        check(parts, tokens, row)
        forwards = row.statistics.forwards
        blocks = -(-(len(prompt) % N + len(template(*parts).token_ids)) // N)
        assert forwards <= blocks * (min(N, options["steps"]) + options["edit_passes"] + 1)
        for schedule in SCHEDULES if attention == "block_causal" else ():
            cached = answer(Wild(likes), prompt, parts, schedule=schedule, **options)
            assert outcome(*cached) == outcome(tokens, row)
        for cache in ("prefix", "dual") if attention == "full" else ():
            check(parts, *answer(Wild(likes, attention="full"), prompt, parts, cache=cache, **options))
        inserted, deleted = inserted + row.statistics.inserted, deleted + row.statistics.deleted
        shorter += len(tokens) < len(template(*parts).token_ids)
    assert inserted > 150 and deleted > 150 and shorter > 25, (inserted, deleted, shorter)


def test_rows_of_a_batch_are_as_alone():
    """Rows with and without templates, of any settings; some join later."""
    random = Random(11)
    for _ in range(5):
        backend = Wild()
        asked = []
        for _ in range(random.randint(2, 5)):
            parts = drawn_parts(random)
            options = DecodeSettings(**{**INDEL, **drawn_options(random), "cache": random.choice(["auto", "none"])})
            plain = random.random() < 0.2
            way = Way(backend, options, template=None if plain else template(*parts))
            asked.append((random.choices(range(3, 20), k=random.randint(1, 9)), way, random.randint(0, 3)))
        batch = JoiningBatch(backend, len(asked), prefix_cache=random.choice([None, 4000]))
        waiting, rows, tokens = list(asked), [], {}
        while waiting or len(batch):
            while waiting and (random.random() < 0.4 or not len(batch)):
                rows.append(batch.add(*waiting.pop(0)))
            for done in batch.step():
                assert done.error is None
                tokens.setdefault(done.handle, []).extend(done.token_ids)
        for handle, (prompt, way, index) in zip(rows, asked, strict=True):
            alone, ids = JoiningBatch(Wild(), 1), []
            own = alone.add(prompt, way, index)
            while len(alone):
                ids += [token for done in alone.step() for token in done.token_ids]
            assert outcome(tokens[handle], handle.row) == outcome(ids, own.row)


def test_candidates_are_as_good_as_logits():
    random = Random(2)
    for _ in range(25):
        parts, options = drawn_parts(random), drawn_options(random)
        prompt = random.choices(range(3, 20), k=random.randint(1, 9))
        backend, other = Wild(), Wild()
        found = answer(backend, prompt, parts, **options)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(indel, "MOST", 0)
            assert outcome(*answer(other, prompt, parts, **options)) == outcome(*found)
        wants = options["temperature"] > 0 and not options["top_k"]
        assert any(inputs.want_logits for inputs in backend.seen) == wants
        assert any(inputs.want_logits for inputs in other.seen)


def test_a_suffix_that_moved_is_cached_anew():
    """With cache dual a block sees what is behind it as its first step left it; after a move that is another step."""
    backend = scripted({4: DELETE, 5: 11, 6: 12, 7: 13}, {}, attention="full")
    phases = []
    answer(backend, [8] * 4, [Gap(1, 4), [5, 6], Gap(1), [7]], lambda row: phases.append(
        dict(row.statistics.forwards_by_phase)), cache="dual")
    assert [phase["full"] for phase in phases[:3]] == [1, 2, 2] and phases[2]["denoise"] == 1


@pytest.mark.parametrize("kind", ["block", "dense"])
def test_salient_steps(kind):
    """What moved is another token at its place, which a salient step recomputes; all dense is the plain result."""
    backend = EagerBackend(make_model(kind, 3))
    options = {"steps": 4, "threshold": 0.02, "edit_threshold": 0.0, "edit_passes": 6, "eos_id": -1}
    said, _ = answer(backend, [3, 1, 4, 1, 5], [Gap(60)], insert_delete=False, **options)
    (split, _), (delete, _) = Counter(said).most_common(2)  # random weights say them often
    backend.description = backend.description.model_copy(update={"edit_tokens": EditTokens(delete=delete, split=split)})
    parts = [Gap(2, 9), [5, 6, 4], Gap(4, 8), [9, 9], Gap(1, 5), [3]]
    plain = answer(backend, [3, 1, 4, 1, 5], parts, cache="block" if kind == "block" else "none", **options)
    dense = answer(backend, [3, 1, 4, 1, 5], parts, salient_threshold=0.99, refresh_interval=1, **options)
    assert outcome(*dense) == outcome(*plain) and plain[1].statistics.deleted > 0
    oracle = answer(backend, [3, 1, 4, 1, 5], parts, salient_threshold=1.5, exact_first_layer=True, **options)
    if kind == "block":
        assert outcome(*oracle) == outcome(*plain)
    for tokens, row in (plain, oracle, answer(backend, [3, 1, 4, 1, 5], parts, salient_threshold=0.99, **options)):
        ids = list(tokens)
        for start, stop in reversed(row.answer_gaps()):
            del ids[start:stop]
        assert ids == [5, 6, 4, 9, 9, 3]
        assert all(a <= n <= b for (a, b), n in zip(((2, 9), (4, 8), (1, 5)), (
            stop - start for start, stop in row.answer_gaps()), strict=True))


def test_a_template_with_its_gaps_where_they_are():
    made = template([3], Gap(1, 4), [4, 5], Gap(3), [6])
    moved = made.at(((1, 2), (4, 7)))
    assert moved.token_ids == (3, OPEN, 4, 5, OPEN, OPEN, OPEN, 6)
    assert made.at([(gap.start, gap.stop) for gap in made.gaps]) == made
    assert made.in_sight(2, lambda place: (place // 4 + 1) * 4) == [1, 0]  # position 6 sees to 8, 11 to 12
    assert moved.in_sight(2, lambda place: (place // 4 + 1) * 4) == [0, 1]
    assert moved.in_sight(1, lambda place: (place // 4 + 1) * 4) == [1, 0]


@pytest.mark.parametrize(("parts", "options", "said"), [
    ([Gap(2, 8), [5]], {"insert_delete": False},
     "A gap of between so many and so many tokens, such as Gap(2, 8), needs a model that inserts and deletes, and "
     "insert_delete (LLaDA2.2); give the gap one length, such as Gap(8)."),
    ([[5], Gap(2, 8), Gap(1)], {},
     "The template ends with a gap of 2 to 8 tokens, but behind the last given token the answer may end anywhere; give "
     "it one length, such as Gap(8)."),
    ([Gap(2, 8), [5]], {"backend": Toy()},
     "insert_delete needs the ids of the model's control tokens, and BUNDLE has none; export it again with "
     "--edit-tokens DELETE,SPLIT, or leave insert_delete out.")])
def test_what_is_refused(parts, options, said):
    options = {**INDEL, **options}
    backend = options.pop("backend", Toy(edit_tokens=EDIT))
    with pytest.raises(RequestError) as error:
        Way(backend, DecodeSettings(**options), template=template(*parts))
    assert str(error.value) == said
