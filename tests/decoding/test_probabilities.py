"""Log-probabilities of an answer's tokens: what the forward said that kept each, and nothing else changes."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from canvas_loop import CanvasToy
from hypothesis import given, settings
from hypothesis import strategies as st
from salient_helpers import make_model
from scripted import Scripted
from test_canvas import options as canvas_options
from toy_backend import EOS, MASK, VOCAB, N, Toy

from dmoe_export.decoding.answer import Block, generation_of
from dmoe_export.decoding.batch import JoiningBatch
from dmoe_export.decoding.settings import ACCEPTANCES, DecodeSettings
from dmoe_export.decoding.template import Gap, template_of
from dmoe_export.decoding.way import Way
from dmoe_export.description import EditTokens
from dmoe_export.errors import RequestError
from dmoe_export.model.backend import EagerBackend

DELETE, SPLIT = 21, 22


class Spy:
    """A backend that remembers what its forwards gave; its row's plan says which of them decoded."""

    def __init__(self, backend):
        self.backend, self.steps = backend, []

    def __getattr__(self, name):
        return getattr(self.backend, name)

    def forward(self, inputs, cache):
        outputs = self.backend.forward(inputs, cache)
        places = inputs.logit_rows[0] >= 0
        if places.any():
            positions = inputs.position_ids[0][inputs.logit_rows[0][places]] + self.description.logit_shift
            self.steps.append((positions.tolist(), outputs))
        return outputs


def answer(backend, prompt, template=None, **options):
    """Tokens, probabilities, statistics and the last finish_reason of one row."""
    batch = JoiningBatch(backend, 1)
    batch.add(prompt, Way(backend, DecodeSettings(**options), template=template))
    tokens, said, done = [], [], None
    while len(batch):
        for done in batch.step():
            if done.error:
                raise done.error
            tokens += done.token_ids
            said += done.probabilities or []
            assert (done.probabilities is None) == ("logprobs" not in options)
    return tokens, said, done.statistics, done.finish_reason


def log_softmax(logits, mask):
    """In float64, without the mask."""
    logits = logits.astype(np.float64)
    if mask >= 0:
        logits[mask] = -np.inf
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def options(random, attention):
    caches = ["auto", "none"] if attention == "block_causal" else ["auto", "none", "prefix", "dual"]
    chosen = {"max_new_tokens": random.randint(1, 4 * N), "cache": random.choice(caches), "steps": random.randint(1, 9),
              "acceptance": random.choice(ACCEPTANCES), "threshold": random.choice([0.2, 0.6, 0.95]),
              "schedule": random.choice(["merged", "reference"]), "seed": random.randint(0, 9),
              "eos_id": random.choice([None, -1, [EOS, 5]]), "early_stop": random.random() < 0.5}
    if random.random() < 0.5:
        chosen |= {"temperature": random.choice([0.5, 1.5]), "top_k": random.choice([0, 3]),
                   "top_p": random.choice([1.0, 0.8])}
    if random.random() < 0.5:
        chosen |= {"edit_threshold": random.choice([0.0, 0.3]), "edit_passes": random.randint(0, 4),
                   "penalty_lambda": random.choice([0.0, 2.0])}
        if attention == "block_causal":
            chosen["edit_blocks"] = random.choice([0, 1, 3])
    return chosen


@settings(max_examples=120)
@given(st.integers(0, 2**32), st.sampled_from([("block_causal", False), ("full", False), ("full", True)]))
def test_records_are_what_the_forward_said_that_kept_the_token(seed, kind):
    random = Random(seed)
    asked, top = options(random, kind[0]), random.choice([0, 1, 4, 20])
    prompt = random.choices(range(3, VOCAB), k=random.randint(1, 10))
    spy = Spy(Toy(*kind, edit_tokens=random.choice([None, EditTokens(delete=DELETE, split=SPLIT)])))
    tokens, said, statistics, _ = answer(spy, prompt, logprobs=top, **asked)
    plain = answer(Toy(*kind, edit_tokens=spy.description.edit_tokens), prompt, **asked)
    assert tokens == plain[0] == [one.token_id for one in said] and plain[2].entropy_by_step is None
    counted = statistics.as_dict()
    assert len(counted.pop("entropy_by_step")) == len(spy.steps)
    other = plain[2].as_dict()
    del counted["seconds_by_phase"], other["seconds_by_phase"]
    assert counted == other
    for position, one in enumerate(said, len(prompt)):
        positions, outputs = spy.steps[one.step]
        logits = log_softmax(outputs.logits[0, positions.index(position)], MASK)
        assert one.logprob == pytest.approx(logits[one.token_id], abs=1e-6)
        order = np.argsort(-logits, kind="stable")[:top]
        assert [other.token_id for other in one.top] == order.tolist()
        assert [other.logprob for other in one.top] == pytest.approx(logits[order].tolist(), abs=1e-6)


@settings(max_examples=40)
@given(st.integers(0, 2**32))
def test_a_token_is_kept_by_the_last_step_that_wrote_it(seed):
    """By the canvases that the steps saw: the token stands there from the step after on, and before it did not."""
    random = Random(seed)
    asked = options(random, "full") | {"cache": "none", "edit_threshold": 0.2, "edit_passes": 4, "max_new_tokens": 9}
    spy, prompt = Spy(Toy("full")), [5, 7, 9]
    tokens, said, _, _ = answer(spy, prompt, logprobs=0, **asked)
    seen = [inputs.input_ids[0].tolist() for inputs in spy.backend.seen]
    assert len(seen) == len(spy.steps)
    for position, (token, one) in enumerate(zip(tokens, said, strict=True), len(prompt)):
        assert seen[one.step][position] != token
        assert all(canvas[position] == token for canvas in seen[one.step + 1:])


def test_greedy_confidences_and_entropies():
    """The probability is the head's confidence; a step's entropy is the mean over places that were masked before it."""
    spy = Spy(Toy("full"))
    _, said, statistics, _ = answer(spy, [5, 7], logprobs=1, max_new_tokens=7, cache="none", acceptance="fixed",
                                    steps=2, eos_id=-1)
    for position, one in enumerate(said, 2):
        positions, outputs = spy.steps[one.step]
        assert np.exp(one.logprob) == pytest.approx(outputs.confidence[0, positions.index(position)], rel=1e-6)
        assert one.top[0].token_id == one.token_id and one.top[0].logprob == one.logprob
    wanted = []
    for positions, outputs in spy.steps:
        shares = [log_softmax(outputs.logits[0, m], MASK) for m in range(len(positions))]
        wanted.append(np.mean([-(np.exp(s[s > -np.inf]) * s[s > -np.inf]).sum() for s in shares]))
    assert statistics.entropy_by_step == pytest.approx(wanted, rel=1e-6) and len({len(p) for p, _ in spy.steps}) > 1


def test_a_step_that_only_edits_has_no_entropy():
    spy = Spy(Toy())
    _, _, statistics, _ = answer(spy, [5, 7, 8, 9], logprobs=0, max_new_tokens=N, steps=1, edit_threshold=0.99,
                                 edit_passes=3, eos_id=-1)
    assert statistics.entropy_by_step[0] > 0 and statistics.entropy_by_step[1:] == [None] * (len(spy.steps) - 1)
    assert len(spy.steps) > 1


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.sampled_from(["block_causal", "full"]))
def test_records_follow_tokens_that_insert_and_delete_move(seed, attention):
    """Where a token was before steps moved it cannot be told from the answer: the forward says it at some place."""
    random = Random(seed)
    asked = {"max_new_tokens": random.randint(1, 14), "steps": random.choice([1, 2, 4, 9]), "insert_delete": True,
             "threshold": random.choice([0.0, 0.6, 1.0]), "edit_threshold": random.choice([0.0, 0.5]),
             "edit_passes": random.choice([0, 1, 4, 16]), "temperature": random.choice([0.0, 1.5]),
             "top_k": random.choice([0, 5]), "seed": random.randint(0, 5)}
    edit, prompt = EditTokens(delete=DELETE, split=SPLIT), random.choices(range(3, VOCAB), k=random.randint(1, 9))
    spy = Spy(Toy(attention, edit_tokens=edit))
    tokens, said, _, _ = answer(spy, prompt, logprobs=2, **asked)
    assert tokens == answer(Toy(attention, edit_tokens=edit), prompt, **asked)[0] == [one.token_id for one in said]
    for one in said:
        positions, outputs = spy.steps[one.step]
        here = [log_softmax(outputs.logits[0, m], MASK)[one.token_id] for m in range(len(positions))]
        assert min(abs(np.array(here) - one.logprob)) < 1e-6


def test_a_deleted_place_takes_its_record_along():
    """Step 0 fills 5 6 7 8 with logits 4, 5, 6, 7; step 1 deletes the first: the rest move, a mask comes at the end."""
    def says(count, positions, ids):
        logits = np.zeros((len(positions), VOCAB))
        for m, (position, token) in enumerate(zip(positions, ids, strict=True)):
            if count == 0:
                logits[m, 5 + position - N] = 4 + position - N
            elif count == 1:
                logits[m, DELETE if position == N else token] = 12
            else:
                logits[m, 9 if token == MASK else token] = 12
        return logits

    backend = Scripted(says, N, VOCAB, MASK, edit_tokens=(DELETE, SPLIT))
    tokens, said, statistics, _ = answer(backend, [3] * N, logprobs=0, max_new_tokens=N, insert_delete=True, steps=4,
                                         edit_threshold=0.5, threshold=0.1, edit_passes=4, eos_id=-1)
    assert tokens == [6, 7, 8, 9] and statistics.deleted == 1
    assert [one.step for one in said] == [0, 0, 0, 2]
    total = [np.log(np.exp(k) + VOCAB - 2) for k in (5, 6, 7, 12)]
    assert [one.logprob for one in said] == pytest.approx([5 - total[0], 6 - total[1], 7 - total[2], 12 - total[3]])


def test_a_token_that_is_masked_and_comes_back_is_of_the_step_in_which_it_came_back():
    def says(count, positions, ids):
        logits = np.zeros((len(positions), VOCAB))
        for m, position in enumerate(positions):
            token = 6 if position > N else MASK if count == 1 else 5
            logits[m, token] = 12 if position > N else 4 + count
        return logits

    _, said, statistics, _ = answer(Scripted(says, N, VOCAB, MASK), [3] * N, logprobs=1, max_new_tokens=N, eos_id=-1,
                                    edit_threshold=0.1, threshold=0.1, steps=8)
    assert [one.step for one in said] == [2, 0, 0, 0] and statistics.entropy_by_step[1] is None
    assert said[0].logprob == said[0].top[0].logprob == pytest.approx(6 - np.log(np.exp(6) + VOCAB - 2))


@settings(max_examples=40)
@given(st.integers(0, 2**32))
def test_a_canvas_tells_its_last_step(seed):
    random = Random(seed)
    asked, prompt = canvas_options(random), random.choices(range(VOCAB), k=random.randint(1, 9))
    spy = Spy(CanvasToy())
    tokens, said, statistics, _ = answer(spy, prompt, logprobs=0, **asked)
    plain = answer(CanvasToy(), prompt, **asked)
    assert tokens == plain[0] == [one.token_id for one in said] and not any(one.top for one in said)
    assert not any(inputs.want_logits for inputs in spy.seen)
    assert statistics.entropy_by_step == pytest.approx([outputs.canvas.entropy[0].mean() for _, outputs in spy.steps])
    for position, one in enumerate(said, len(prompt)):
        positions, outputs = spy.steps[one.step]
        assert np.exp(one.logprob) == pytest.approx(outputs.confidence[0, positions.index(position)], rel=1e-6)
    with pytest.raises(RequestError, match="the best token alone; give 0"):
        answer(spy, prompt, logprobs=1, **asked)


def test_a_canvas_with_given_places_tells_of_the_token_that_it_took():
    """Where an end token is the best in front of given text, another is taken, with its own probability."""
    end = {token for token in range(3, VOCAB) if token != 8}  # nearly all, so that some place wants one
    spy, prompt = Spy(CanvasToy()), [5, 6]
    template = template_of([Gap(5), [8], Gap(2), [8]], lambda text: [])
    _, said, _, _ = answer(spy, prompt, template, logprobs=0, eos_id=sorted(end))
    others = 0
    for position, one in enumerate(said, len(prompt)):
        if one.logprob is None:
            continue
        positions, outputs = spy.steps[one.step]
        m, found = positions.index(position), outputs.candidates
        rank = found.token_ids[0, m].tolist().index(one.token_id)
        share = outputs.confidence[0, m] * np.exp(found.logits[0, m, rank] - found.logits[0, m, 0])
        assert one.token_id not in end and np.exp(one.logprob) == pytest.approx(share, rel=1e-5)
        others += rank > 0
    assert others


@pytest.mark.parametrize("attention", ["block_causal", "full"])
@pytest.mark.parametrize("more", [{}, {"edit_threshold": 0.0}, {"temperature": 1.0}])
def test_given_places_of_a_template_have_none(attention, more):
    template = template_of([[7, 8], Gap(3), [9], Gap(4), [3]], lambda text: [])
    tokens, said, statistics, reason = answer(Toy(attention), [5, 6, 7], template, logprobs=2, **more)
    assert reason == "filled" and [one.token_id for one in said] == tokens
    given = [token >= 0 for token in template.token_ids]
    assert [one.logprob is None and one.step is None and not one.top for one in said] == given
    assert all(one.logprob < 0 and len(one.top) == 2 for one, is_given in zip(said, given, strict=True) if not is_given)
    assert all(entropy is None or entropy > 0 for entropy in statistics.entropy_by_step)


@pytest.mark.parametrize("kind", ["dense", "block"])
@pytest.mark.parametrize("more", [{}, {"temperature": 0.8, "top_k": 3}])
def test_salient_steps_and_the_eager_model(kind, more):
    """States of salient steps are the backend's: logits beside what a step wants change no token."""
    backend, shared = EagerBackend(make_model(kind, 3)), {
        "max_new_tokens": 12, "eos_id": -1, "steps": 4, "acceptance": "fixed", "salient_threshold": 0.99, **more}
    tokens, said, statistics, _ = answer(backend, [3, 1, 4, 1, 5], logprobs=3, **shared)
    assert tokens == answer(backend, [3, 1, 4, 1, 5], **shared)[0] == [one.token_id for one in said]
    assert len(said) == 12 and all(one.logprob < 0 and len(one.top) == 3 for one in said)
    assert all(entropy > 0 for entropy in statistics.entropy_by_step)


def test_ends_cut_probabilities_as_they_cut_tokens():
    """A stop in the middle of a block, an end token, and a row that is cancelled."""
    backend, asked = Toy(), DecodeSettings(max_new_tokens=3 * N, eos_id=-1, logprobs=1)
    batch = JoiningBatch(backend, 3)
    whole = answer(Toy(), [5] * N, max_new_tokens=3 * N, eos_id=-1, logprobs=1)
    ends = DecodeSettings(max_new_tokens=3 * N, eos_id=whole[0][N + 1], logprobs=1)
    at = whole[0].index(whole[0][N + 1])
    batch.add([5] * N, asked, ends=lambda ids, last: 2)
    batch.add([5] * N, ends)
    gone = batch.add([5] * N, asked)
    found = {0: [], 1: [], 2: []}
    rows = {id(handle): i for i, handle in enumerate(batch._rows)}
    while len(batch):
        for done in batch.step():
            found[rows[id(done.handle)]].append(done)
            if done.handle is gone:
                batch.cancel(gone)
    for i, wanted in enumerate((2, at, N)):
        said = [one for done in found[i] for one in done.probabilities]
        assert [one.token_id for one in said] == [token for done in found[i] for token in done.token_ids]
        assert said == whole[1][:wanted], i
    assert found[2][-1].finish_reason == "cancelled" and found[2][-1].probabilities == []


def test_rows_beside_it_pay_logits_alone():
    """A row without it has no records, and answers as it would alone."""
    batch, alone = JoiningBatch(Toy(), 2), answer(Toy(), [5, 7], max_new_tokens=N)
    batch.add([5, 7], DecodeSettings(max_new_tokens=N))
    batch.add([5, 8], DecodeSettings(max_new_tokens=N, logprobs=2))
    done = [one for _ in range(20) for one in batch.step()]
    plain = [one for one in done if one.handle.row.settings.logprobs is None]
    assert [token for one in plain for token in one.token_ids] == alone[0]
    assert all(one.probabilities is None and one.statistics.entropy_by_step is None for one in plain)
    assert any(one.probabilities for one in done)


def test_unlikely_is_no_number_that_json_lacks():
    """Tokens at −inf are not among the most probable, and a sure step has no entropy."""
    def says(count, positions, ids):
        logits = np.full((len(positions), VOCAB), -np.inf)
        logits[:, 5] = 3.0
        logits[:, MASK] = 9.0
        return logits

    _, said, statistics, _ = answer(Scripted(says, N, VOCAB, MASK), [3] * N, logprobs=20, max_new_tokens=2, eos_id=-1)
    assert [(one.logprob, [other.token_id for other in one.top]) for one in said] == [(0.0, [5])] * 2
    assert statistics.entropy_by_step == [0.0]


def test_the_answer_of_blocks():
    _, said, statistics, _ = answer(Toy(), [5] * N, logprobs=1, max_new_tokens=6, eos_id=-1)
    blocks = [Block(0, [one.token_id for one in part], None, reason, statistics, probabilities=part)
              for part, reason in ((said[:4], None), (said[4:], "length"))]
    whole = generation_of(blocks)
    assert whole.probabilities == said
    shown = whole.as_dict()["probabilities"][0]
    nothing, best = {"token": None, "bytes": None}, said[0].top[0]
    assert shown == {"token_id": said[0].token_id, "logprob": said[0].logprob, "step": said[0].step, **nothing,
                     "top": [{"token_id": best.token_id, "logprob": best.logprob, **nothing}]}


@pytest.mark.parametrize("value", [-1, 21, True, 1.5, "many"])
def test_other_values_are_refused(value):
    with pytest.raises(RequestError, match=r"^logprobs is "):
        DecodeSettings(logprobs=value)
