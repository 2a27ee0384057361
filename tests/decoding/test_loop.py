"""The loop's rules with a scripted backend: ends, masks, prompts, batches. No model in sight."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dmoe_export.decoding.loop import BlockDiffusion
from dmoe_export.decoding.settings import DecodeSettings
from dmoe_export.description import ModelDescription, MoeDescription, RoutingDescription
from dmoe_export.errors import NotFiniteError, RequestError
from dmoe_export.runtime.backend import ForwardOutputs

N, EOS, MASK = 4, 1, 2
MOE = MoeDescription(num_experts=4, experts_per_token=1, expert_width=4, shared_width=0, num_groups=1, groups_kept=1,
                     routed_scaling=1, first_dense_layers=0)
MODEL = ModelDescription(family="f", architecture="a", vocab_size=200, hidden_size=4, num_layers=1, num_heads=1,
                         num_kv_heads=1, head_dim=4, dense_width=4, moe=MOE, qk_norm=True, rope_theta=1e4, rotary_dim=4,
                         rms_eps=1e-6, max_positions=2000, tie_embeddings=False, mask_id=MASK, eos_ids=(EOS,),
                         pad_id=EOS)


class ScriptedCache:
    """Remembers the positions each row committed."""

    def __init__(self, rows):
        self.positions = [[] for _ in range(rows)]

    def part(self, rows):
        part = ScriptedCache(0)
        part.positions = [self.positions[row] for row in rows]
        return part

    def commit(self, inputs, outputs, take, rows):
        assert inputs.want_keys_values
        for i, row in enumerate(rows):
            self.positions[row] += inputs.position_ids[i, take[i]].tolist()

    def leave(self, row, last):
        self.positions[row], self.positions[last] = self.positions[last], []


class Scripted:
    """Predicts `token(position)` with `confidence(position)`; routes token i to expert i % 4."""

    name, description, limits, opens_blocks = "scripted", MODEL, None, False
    routing = RoutingDescription.default(MOE, block_length=N)

    def __init__(self, token=lambda p: 100 + p, confidence=lambda p: 0.99):
        self.token, self.confidence = token, confidence
        self.seen = []

    def new_cache(self, rows):
        return ScriptedCache(rows)

    def forward(self, inputs, cache):
        self.seen.append(inputs)
        for row, positions in enumerate(inputs.position_ids):  # an exact cache: all earlier blocks, nothing else
            real = positions[positions >= 0]
            if len(real):
                assert cache.positions[row] == list(range(real[0]))
        wanted = np.take_along_axis(inputs.position_ids, np.maximum(inputs.logit_rows, 0), 1)
        ids = np.vectorize(self.token, otypes=[np.int64])(wanted)
        confidence = np.vectorize(self.confidence, otypes=[np.float32])(wanted)
        experts = np.where(inputs.position_ids >= 0, inputs.position_ids % 4, -1)[None, ..., None].astype(np.int32)
        return ForwardOutputs(ids, confidence, experts, None, ())


def run(backend, prompts, **options):
    tokens, last = {i: [] for i in range(len(prompts))}, {}
    for block in BlockDiffusion(backend, DecodeSettings(**options), bytes_per_expert=10).decode(prompts):
        tokens[block.index] += block.token_ids
        last[block.index] = block
    return [tokens[i] for i in range(len(prompts))], [last[i] for i in range(len(prompts))]


def answer(prompt_length, count):
    return [100 + p for p in range(prompt_length, prompt_length + count)]


def test_length_end_and_no_tail():
    """Positions past max_new_tokens are decoded with their block but not returned."""
    tokens, last = run(Scripted(), [[7] * 6], max_new_tokens=5)
    assert tokens == [answer(6, 5)] and last[0].finish_reason == "length"
    statistics = last[0].statistics
    assert statistics.forwards_by_phase == {"prefill": 1, "full": 0, "denoise": 2, "commit": 1}
    assert statistics.unique_experts == 4.0
    assert statistics.expert_bytes_touched == 2 * 4 * 10  # of forwards that ran: the prefill and the commit rode along
    assert statistics.tokens_per_forward == 5 / 4 and statistics.executed_forwards == 2


def test_eos_ends_and_is_not_returned():
    tokens, last = run(Scripted(token=lambda p: EOS if p >= 9 else 100 + p), [[7] * 6], max_new_tokens=20)
    assert tokens == [[106, 107, 108]] and last[0].finish_reason == "eos"


def test_eos_waits_for_masks_before_it():
    """Position 9 says EOS at once, 8 is decoded two steps later: only then the sequence ends."""
    backend = Scripted(token=lambda p: EOS if p == 9 else 100 + p,
                       confidence=lambda p: {9: 0.99, 10: 0.6, 8: 0.5}.get(p, 0.4))
    tokens, last = run(backend, [[7] * 8], max_new_tokens=4)
    assert tokens == [[108]] and last[0].finish_reason == "eos"
    assert last[0].statistics.forwards_by_phase["denoise"] == 3
    late = run(backend, [[7] * 8], max_new_tokens=4, early_stop=False)[1][0]
    assert late.finish_reason == "eos" and late.statistics.forwards_by_phase["denoise"] == 4


def test_eos_past_the_end_does_not_count():
    tokens, last = run(Scripted(token=lambda p: EOS if p == 11 else 100 + p), [[7] * 8], max_new_tokens=3)
    assert tokens == [answer(8, 3)] and last[0].finish_reason == "length"


def test_eos_in_the_prompt_is_text():
    tokens, last = run(Scripted(), [[EOS, 7, EOS, EOS, EOS]], max_new_tokens=3)
    assert tokens == [answer(5, 3)] and last[0].finish_reason == "length"


def test_mask_id_in_the_prompt_is_text():
    backend = Scripted()
    tokens, _ = run(backend, [[7, 7, 7, 7, MASK]], max_new_tokens=3, schedule="reference")
    assert tokens == [answer(5, 3)]
    assert backend.seen[1].input_ids[0, 0] == MASK  # still there when its block is denoised


def test_eos_minus_one_never_ends():
    tokens, last = run(Scripted(token=lambda p: EOS), [[7]], max_new_tokens=6, eos_id=-1)
    assert tokens == [[EOS] * 6] and last[0].finish_reason == "length"


@pytest.mark.parametrize(("eos", "count"), [
    (110, 4), ([110], 4), ((107, 110), 1), ([150, 109, 110], 3), (np.array([108, 110]), 2), ([-1], 8), (None, 6)])
def test_several_tokens_may_end_an_answer(eos, count):
    """The first of them, wherever in the list; None: all of the model's."""
    backend = Scripted()
    backend.description = MODEL.model_copy(update={"eos_ids": (EOS, 113, 112)})
    tokens, last = run(backend, [[7] * 6], max_new_tokens=8, eos_id=eos)
    assert tokens == [answer(6, count)] and last[0].finish_reason == ("length" if count == 8 else "eos")


@pytest.mark.parametrize(("eos", "sentence"), [
    ([], "eos_id is .*several of them, or -1 alone"), ([3, -1], "or -1 alone for none"), (-2, "eos_id is -2, it must"),
    ("3", "eos_id is '3', it must be an integer"), ([3, 2.0], "eos_id is 2.0, it must be an integer"),
    (True, "eos_id is True"), ([None], "eos_id is None, it must be an integer"), ({3: 4}, "it must be an integer")])
def test_bad_ends(eos, sentence):
    with pytest.raises(RequestError, match=sentence):
        DecodeSettings(eos_id=eos)


def test_many_steps_cost_nothing():
    tokens, last = run(Scripted(confidence=lambda p: 0.1), [[7] * 4], max_new_tokens=4, steps=2**60)
    assert tokens == [answer(4, 4)] and last[0].statistics.forwards_by_phase["denoise"] == 4


def test_steps_run_out():
    """Two steps per block: what the policy did not take is filled by its choice."""
    _, last = run(Scripted(confidence=lambda p: 0.1), [[7] * 4], max_new_tokens=4, steps=2, acceptance="factor",
                  factor=0.0)
    assert last[0].statistics.forwards_by_phase["denoise"] == 2


def test_low_confidence_follows_the_schedule():
    _, last = run(Scripted(confidence=lambda p: 0.1), [[7] * 4], max_new_tokens=4, steps=3)
    assert last[0].statistics.forwards_by_phase["denoise"] == 3  # 2 + 1 + 1


def test_only_masked_places_ask_for_a_vocabulary_row():
    backend = Scripted(confidence=lambda p: 0.99 if p % 2 else 0.1)
    run(backend, [[7] * 5], max_new_tokens=3, schedule="reference")
    assert backend.seen[0].logit_rows.tolist() == [[-1]]  # prefill
    assert backend.seen[1].logit_rows.tolist() == [[1, 2, 3]]
    assert backend.seen[2].logit_rows.tolist() == [[2]]
    backend.seen.clear()
    run(backend, [[7] * 5], max_new_tokens=3)
    assert [inputs.logit_rows.tolist() for inputs in backend.seen] == [[[5, 6, 7]], [[2]]]  # the prompt's block rides


def test_batch_of_rows_in_different_phases():
    prompts = [[7] * length for length in (1, 4, 6, 13)]
    backend = Scripted(token=lambda p: EOS if p == 15 else 100 + p, confidence=lambda p: 0.99 if p % 3 else 0.2)
    tokens, last = run(backend, prompts, max_new_tokens=9)
    for i, prompt in enumerate(prompts):
        alone_tokens, alone_last = run(backend, [prompt], max_new_tokens=9)
        assert tokens[i] == alone_tokens[0]
        assert last[i].finish_reason == alone_last[0].finish_reason
        assert last[i].statistics.forwards_by_phase == alone_last[0].statistics.forwards_by_phase


def test_long_prompts_are_prefilled_in_chunks():
    backend = Scripted()
    tokens, last = run(backend, [[7] * 1030, [7] * 3], max_new_tokens=2)
    assert tokens[0] == answer(1030, 2) and tokens[1] == answer(3, 2)
    assert last[0].statistics.forwards_by_phase["prefill"] == 3
    assert last[1].statistics.forwards_by_phase["prefill"] == 0


def test_blocks_are_streamed_as_they_finish():
    blocks = list(BlockDiffusion(Scripted(), DecodeSettings(max_new_tokens=10)).decode([[7] * 6]))
    assert [b.token_ids for b in blocks] == [answer(6, 2), answer(8, 4), answer(12, 4)]
    assert [b.finish_reason for b in blocks] == [None, None, "length"]


@pytest.mark.parametrize("prompt_length", [1, 3, 4, 5, 8])
def test_every_prompt_length_meets_the_grid(prompt_length):
    tokens, _ = run(Scripted(), [[7] * prompt_length], max_new_tokens=7)
    assert tokens == [answer(prompt_length, 7)]


class Broken(Scripted):
    """From position `since` on, row `row` has confidences of `value`; logits, where asked for, are `logit` there."""

    def __init__(self, value, since=0, row=0, logit=0.0):
        super().__init__()
        self.value, self.since, self.row, self.logit = value, since, row, logit

    def forward(self, inputs, cache):
        outputs = super().forward(inputs, cache)
        places = np.take_along_axis(inputs.position_ids, np.maximum(inputs.logit_rows, 0), 1)
        bad = (places >= self.since) & (inputs.logit_rows >= 0)
        bad[np.arange(len(bad)) != self.row] = False
        logits = np.zeros((*bad.shape, MODEL.vocab_size), np.float32) if inputs.want_logits else None
        if logits is not None:
            logits[bad] = self.logit
        return replace(outputs, confidence=np.where(bad, np.float32(self.value), outputs.confidence), logits=logits)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("options", [{}, {"acceptance": "fixed", "steps": 1}, {"acceptance": "factor"},
                                     {"acceptance": "hierarchy"}, {"edit_threshold": 0.9}, {"temperature": 1.0}])
def test_numbers_that_are_not_finite_are_no_answer(value, options):
    loop = BlockDiffusion(Broken(value), DecodeSettings(max_new_tokens=8, **options))
    with pytest.raises(NotFiniteError, match=r"Prompt 0 gets no answer: in block 0 .* weights are damaged"):
        list(loop.decode([[7] * 6]))


@pytest.mark.parametrize("logit", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"acceptance": "credit"}])
def test_logits_that_are_not_finite_are_no_answer_either(logit, options):
    """Whatever the confidence beside them says."""
    loop = BlockDiffusion(Broken(0.99, logit=logit), DecodeSettings(max_new_tokens=8, **options))
    with pytest.raises(NotFiniteError):
        list(loop.decode([[7] * 6]))


def test_blocks_before_such_numbers_stay_and_the_row_is_named():
    loop = BlockDiffusion(Broken(np.nan, since=8, row=1), DecodeSettings(max_new_tokens=12), precision="fp16")
    blocks = loop.decode([[7] * 4, [7] * 4])
    assert [next(blocks).token_ids for _ in range(2)] == [[104, 105, 106, 107]] * 2
    with pytest.raises(NotFiniteError, match=r"Prompt 1 gets no answer: in block 1 .* likely an overflow past 65504"):
        next(blocks)


def test_what_was_not_asked_may_be_anything():
    """Padding, prefills and commits hold numbers without meaning; a token that cannot be chosen is at −inf."""
    class Odd(Broken):
        def forward(self, inputs, cache):
            outputs = super().forward(inputs, cache)
            return replace(outputs, confidence=np.where(inputs.logit_rows >= 0, outputs.confidence, np.float32("nan")))
    blocks = list(BlockDiffusion(Odd(0.99), DecodeSettings(max_new_tokens=6)).decode([[7] * 6, [7] * 3]))
    assert sum(len(block.token_ids) for block in blocks) == 12
