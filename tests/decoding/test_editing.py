"""Token editing and credit inside the loop, with predictions scripted per forward: who says what, and when."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from toy_backend import EOS, MASK, VOCAB, Toy, decode

from dmoe_export.runtime.backend import ForwardOutputs
from dmoe_export.runtime.candidates import best_of


class Script(Toy):
    """Denoise forward f predicts script[min(f, last)][position] = (token, confidence)."""

    def __init__(self, *script):
        super().__init__()
        self.script, self.count = script, 0

    def forward(self, inputs, cache):
        outputs = super().forward(inputs, cache)
        if not (inputs.logit_rows >= 0).any():
            return outputs
        now = self.script[min(self.count, len(self.script) - 1)]
        self.count += 1
        positions = np.take_along_axis(inputs.position_ids, np.maximum(inputs.logit_rows, 0), 1)[0]
        said = [now[p] for p in positions.tolist()]
        logits = np.full((1, len(said), VOCAB), 0.0, np.float32)
        for m, (token, confidence) in enumerate(said):  # all but the mask share what the token leaves over
            logits[0, m, token] = np.log(confidence / (1 - confidence) * (VOCAB - 2))
            logits[0, m, MASK] = -50
        return ForwardOutputs(np.array([[t for t, _ in said]]), np.float32([[c for _, c in said]]), outputs.expert_ids,
                              logits if inputs.want_logits else None, outputs.keys_values,
                              best_of(logits, MASK, inputs.candidates) if inputs.candidates else None)


FIRST = {0: (10, 0.9), 1: (11, 0.9), 2: (12, 0.9), 3: (13, 0.2)}


def test_a_decoded_token_is_replaced_by_a_surer_one():
    second = {0: (10, 0.9), 1: (21, 0.8), 2: (22, 0.6), 3: (13, 0.9)}
    toy = Script(FIRST, second)
    tokens, last = decode(toy, [[7]], max_new_tokens=3, threshold=0.5, edit_threshold=0.7)
    assert tokens == [[21, 12, 13]]  # 22 is not sure enough; position 0 is the prompt's
    assert last[0].statistics.edits == 1
    # what was asked: gaps, then decoded places of the answer; never the prompt's
    assert [i.logit_rows.tolist() for i in toy.seen] == [[[1, 2, 3]], [[3, 1, 2]], [[1, 2, 3]]]
    assert decode(Script(FIRST, second), [[7]], max_new_tokens=3, threshold=0.5)[0] == [[11, 12, 13]]


def test_edit_passes_are_counted_from_the_last_mask():
    flip = [{p: (10 + (f + p) % 5, 0.9) for p in range(4)} for f in range(9)]  # never at rest
    for passes in (0, 1, 3):
        tokens, last = decode(Script(*flip), [[7]], max_new_tokens=3, threshold=0.5, edit_threshold=0.5,
                              edit_passes=passes)
        assert tokens == [[flip[passes][p][0] for p in (1, 2, 3)]]
        assert last[0].statistics.forwards_by_phase["denoise"] == 1 + passes
        assert last[0].statistics.edits == 3 * passes


def test_an_eos_that_is_edited_away_does_not_end_the_answer():
    first = {0: (10, 0.9), 1: (EOS, 0.9), 2: (12, 0.9), 3: (13, 0.2)}
    second = {1: (21, 0.9), 2: (12, 0.9), 3: (13, 0.9)}
    tokens, last = decode(Script(first, second), [[7]], max_new_tokens=3, threshold=0.5, edit_threshold=0.5)
    assert tokens == [[21, 12, 13]] and last[0].finish_reason == "length"
    tokens, last = decode(Script(first, second), [[7]], max_new_tokens=3, threshold=0.5)
    assert tokens == [[]] and last[0].finish_reason == "eos"


def test_editing_while_sampling_compares_with_the_best_token():
    """A sampled token is edited to the argmax when that is sure."""
    sure = {p: (10 + p, 0.9) for p in range(4)}
    tokens, last = decode(Script(sure), [[7]], max_new_tokens=3, temperature=50.0, threshold=0.0, steps=1, seed=3,
                          edit_threshold=0.5)
    assert tokens == [[11, 12, 13]] and last[0].statistics.edits > 0


def test_credit_decodes_earlier_and_starts_anew_with_every_block():
    steady = {p: (10, 0.75) for p in range(8)}
    options = {"max_new_tokens": 7, "threshold": 0.85, "steps": 32, "eos_id": -1}
    plain = decode(Script(steady), [[7]], **options)[1][0].statistics.forwards_by_phase["denoise"]
    toy = Script(steady)
    tokens, last = decode(toy, [[7]], acceptance="credit", schedule="reference", **options)
    assert tokens == [[10] * 7]
    assert plain == 7
    places = [(i.position_ids[0, 0], (i.logit_rows >= 0).sum()) for i in toy.seen if (i.logit_rows >= 0).any()]
    by_block = [[int(count) for start, count in places if start == first] for first in (0, 4)]
    # p 0.75 → 0.83 with the first step's credit, 0.86 with the second's: one by the schedule, then the rest
    assert by_block == [[3, 2], [4, 3]]
    assert last[0].statistics.forwards_by_phase["denoise"] == 4


@pytest.mark.parametrize("acceptance", ["credit", "threshold"])
def test_only_rules_that_need_logits_fetch_them(acceptance):
    toy = Toy()
    decode(toy, [[7] * 9], max_new_tokens=4, acceptance=acceptance, eos_id=-1)
    assert [i.want_logits for i in toy.seen] == [acceptance == "credit" and bool((i.logit_rows >= 0).any())
                                                for i in toy.seen]


def test_where_the_mask_is_best_a_place_stays_masked_or_becomes_it_until_steps_are_over():
    says = {0: (10, 0.9), 1: (11, 0.9), 2: (MASK, 0.9), 3: (13, 0.9)}
    again = {**says, 1: (MASK, 0.9)}
    for steps in (32, 3, 2):
        toy = Masking(says, again, {1: (21, 0.9), 2: (22, 0.9), 3: (13, 0.9)})
        tokens, _ = decode(toy, [[7]], max_new_tokens=3, threshold=0.5, edit_threshold=0.5, steps=steps, eos_id=-1)
        assert [(i.input_ids == MASK).sum() for i in toy.seen][:3] == ([3, 1, 2] if steps > 2 else [3, 1, 0])
        assert tokens == [[21, 22, 13]] and len(toy.seen) == 4, steps


class Masking(Script):
    """As told, the mask too: where it is best, the next is the lowest token."""

    def forward(self, inputs, cache):
        inputs = replace(inputs, want_logits=True)
        out = super().forward(inputs, cache)
        now = self.script[min(self.count - 1, len(self.script) - 1)]
        positions = np.take_along_axis(inputs.position_ids, np.maximum(inputs.logit_rows, 0), 1)[0].tolist()
        for m, position in enumerate(positions):
            token, share = now[position]
            out.logits[0, m, MASK] = np.log(share / (1 - share) * (VOCAB - 1)) if token == MASK else -50
        others = np.delete(out.logits, MASK, -1).astype(np.float64)
        shares = np.exp(others - others.max(-1, keepdims=True))
        return replace(out, token_ids=np.where(out.token_ids == MASK, 0, out.token_ids),
                       confidence=(1 / shares.sum(-1)).astype(np.float32),
                       candidates=best_of(out.logits, MASK, max(1, inputs.candidates)))


def test_a_penalty_is_on_the_token_before_within_the_block():
    """The same token everywhere: a penalty lets it stand where none is before it; the prompt's counts, too."""
    same = {p: (10, 0.6) for p in range(8)}
    options = {"threshold": 0.5, "edit_threshold": 0.2, "steps": 8, "eos_id": -1, "cache": "none"}
    assert decode(Script(same), [[7, 7, 7]], max_new_tokens=5, **options)[0] == [[10] * 5]
    toy = Script(same)
    tokens, _ = decode(toy, [[7, 7, 10]], max_new_tokens=5, penalty_lambda=20.0, **options)
    assert tokens[0][0] != 10 and tokens[0][1] == 10 and all(i.want_logits for i in toy.seen)
