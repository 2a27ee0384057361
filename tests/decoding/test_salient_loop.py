"""Salient steps in the decoding loop, on the eager model: schedule, batches, capacity, refresh, statistics."""

from __future__ import annotations

from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
from joining import made
from salient_helpers import MASK, make_model

from dmoe_export.decoding.loop import BlockDiffusion
from dmoe_export.decoding.settings import DecodeSettings
from dmoe_export.errors import RequestError
from dmoe_export.model.backend import EagerBackend, EagerSalient
from dmoe_export.runtime.backend import ForwardInputs
from dmoe_export.runtime.salient import SalientStep, SalientSteps

BACKENDS = {kind: EagerBackend(make_model(kind, 3)) for kind in ("dense", "moe", "block")}
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5], [2, 7, 1], [8, 2, 8, 1, 8, 2, 8, 4, 5, 9, 0, 4, 5, 2, 3, 5, 3]]


def decode(kind: str, prompts, places=None, **options):
    """Tokens and statistics of each prompt; `places` of the answers, None where they are not given."""
    settings = DecodeSettings(**({"max_new_tokens": 24, "eos_id": -1, "steps": 4, "acceptance": "fixed"} | options))
    tokens: dict[int, list[int]] = {}
    for block in BlockDiffusion(BACKENDS[kind], settings, template=made(places)).decode(prompts):
        tokens.setdefault(block.index, []).extend(block.token_ids)
        tokens[-1 - block.index] = block.statistics  # type: ignore[assignment]
    return [(tokens[i], tokens[-1 - i]) for i in range(len(prompts))]


class Watched(SalientSteps):
    """Keeps what was asked of the steps."""

    seen: ClassVar[list[tuple[int, int, int, bool]]] = []

    def _run(self, feeds, past, *others):
        got, new, result, need = super()._run(feeds, past, *others)
        positions = feeds["position_ids"][0]
        self.seen.append((int(positions[0]), int(positions[-1]) + 1, past.positions.shape[1], result.salient is None))
        return got, new, result, need


@pytest.fixture
def seen(monkeypatch) -> list[tuple[int, int, int, bool]]:
    monkeypatch.setattr("dmoe_export.decoding.batch.SalientSteps", Watched)
    monkeypatch.setattr(Watched, "seen", [])
    return Watched.seen


@pytest.mark.parametrize("kind", ["dense", "moe", "block"])
@pytest.mark.parametrize("options", [{}, {"acceptance": "threshold", "threshold": 0.3}, {"temperature": 0.7}])
def test_all_steps_dense_is_the_plain_result(kind, options):
    """Also sampled: dense salient steps are forwards of the whole canvas, or of the block."""
    plain = decode(kind, PROMPTS, cache="block" if kind == "block" else "none", **options)
    dense = decode(kind, PROMPTS, salient_threshold=0.99, refresh_interval=1, **options)
    for (want, _), (got, stats) in zip(plain, dense, strict=True):
        assert got == want
        assert stats.salient_rows is None


def test_block_oracle_is_the_plain_block_result():
    """Threshold above 1 with exact layer 0: token for token, and every row of the block is recomputed."""
    plain = decode("block", PROMPTS, steps=8)
    oracle = decode("block", PROMPTS, steps=8, salient_threshold=1.5, exact_first_layer=True)
    for (want, before), (got, stats) in zip(plain, oracle, strict=True):
        assert got == want and stats.forwards == before.forwards
        assert stats.salient_rows == 8 and stats.unique_experts == before.unique_experts


@pytest.mark.parametrize("kind", ["dense", "block"])
@pytest.mark.parametrize("own", [{"refresh_interval": 1}, {"salient_threshold": 1.5, "exact_first_layer": True}, {}])
def test_what_a_template_gives_stays(kind, own):
    """Dense steps, and on blocks the oracle, fill gaps as plain ones do; sparse ones leave given places alone, too."""
    places = [*[None] * 5, *range(10, 22), None, 30, *[None] * 9, 31]
    got = decode(kind, PROMPTS, places, steps=8, **{"salient_threshold": 0.99, **own})
    plain = decode(kind, PROMPTS, places, steps=8, cache="block" if kind == "block" else "none")
    for (tokens, stats), (want, _) in zip(got, plain, strict=True):
        assert (tokens[5:17], tokens[18], tokens[28]) == (list(range(10, 22)), 30, 31)
        assert stats.given_tokens == 14
        if "refresh_interval" in own or (own and kind == "block"):
            assert tokens == want


@pytest.mark.parametrize("kind, options", [
    ("dense", {}), ("moe", {"salient_capacity": 6}), ("block", {"acceptance": "factor", "factor": 2.0})])
def test_batches_in_different_phases_are_single_rows(kind, options):
    """Prompts of different lengths: other blocks, other ranges, other phases, in the same batch."""
    options = {"salient_threshold": 0.995, "full_steps": 2, **options}
    together = decode(kind, PROMPTS, **options)
    for prompt, (tokens, stats) in zip(PROMPTS, together, strict=True):
        (alone, own), = decode(kind, [prompt], **options)
        assert tokens == alone
        assert stats.salient_by_step == own.salient_by_step
        assert stats.forwards_by_phase == own.forwards_by_phase


def test_a_step_that_fails_is_made_up_as_if_it_had_not_been(monkeypatch):
    """The first row of it was computed already, but its state is that of before."""
    calls, at = [0], [0]

    class Failing(SalientSteps):
        def _run(self, *arguments):
            calls[0] += 1
            if calls == at:
                raise MemoryError("once")
            return super()._run(*arguments)

    monkeypatch.setattr("dmoe_export.decoding.batch.SalientSteps", Failing)
    options = {"salient_threshold": 0.995, "full_steps": 1, "steps": 6}
    want = decode("dense", PROMPTS[:2], **options)
    assert calls[0] > 12
    for second_row in (4, 6, 10):
        calls[0], at[0] = 0, second_row
        got = decode("dense", PROMPTS[:2], **options)
        for (tokens, mine), (wanted, theirs) in zip(got, want, strict=True):
            assert tokens == wanted and mine.salient_by_step == theirs.salient_by_step


def test_schedule_of_a_full_canvas(seen):
    """Four dense steps over the canvas, then response only, every fourth step with the prompt."""
    decode("dense", [PROMPTS[0]], salient_threshold=0.99, max_new_tokens=16, steps=8)
    whole, response = (0, 25, 1), (9, 25, 9)
    wanted = [(*whole, True)] * 4 + ([(*response, False)] * 3 + [(*whole, False)]) * 3
    assert seen == wanted[:len(seen)] and len(seen) == 16


def test_schedule_with_refresh_and_full_steps(seen):
    decode("dense", [PROMPTS[0]], salient_threshold=0.99, max_new_tokens=8, steps=8, full_steps=1, refresh_interval=3)
    assert [dense for *_, dense in seen] == [True, False, False, True, False, False, True, False]
    assert all(start == 0 for start, *_, dense in seen if dense)


def test_schedule_of_blocks(seen):
    """The first step of each block is dense; prefill and commit are forwards of the ordinary graph."""
    (_, stats), = decode("block", [PROMPTS[0]], salient_threshold=0.99, max_new_tokens=15)
    ranges = [(start, stop, dense) for start, stop, _, dense in seen]
    assert ranges == [(8, 16, True)] + [(8, 16, False)] * 3 + [(16, 24, True)] + [(16, 24, False)] * 3
    assert stats.forwards_by_phase["commit"] == 1 and stats.forwards_by_phase["prefill"] == 1
    assert len(stats.salient_by_step) == 6 and len(stats.salient_by_step[0]) == 3


def test_capacity_overflow_makes_a_dense_step(seen):
    """Threshold above 1 marks every row: a capacity below the range always overflows."""
    (tokens, stats), = decode("block", [PROMPTS[0]], salient_threshold=1.5, salient_capacity=4)
    (plain, _), = decode("block", [PROMPTS[0]])
    assert tokens == plain  # a dense step is exact
    assert stats.salient_overflows == 12 and stats.salient_by_step == [] and all(dense for *_, dense in seen)


def test_capacity_without_overflow_is_the_dynamic_result():
    for kind in ("dense", "block"):
        (dynamic, own), = decode(kind, [PROMPTS[2]], salient_threshold=0.9)
        (fixed, stats), = decode(kind, [PROMPTS[2]], salient_threshold=0.9, salient_capacity=8)
        assert fixed == dynamic and stats.salient_overflows == 0
        assert stats.salient_by_step == own.salient_by_step


@pytest.mark.parametrize("entering, need, tokens, wanted", [
    (3, None, 32, 24),  # nothing is known: the largest
    (3, 2, 32, 4), (3, 4, 32, 8), (5, 1, 32, 8),  # twice the need, and all that enter
    (3, 13, 32, 24), (3, 40, 32, 24),  # the largest where none has twice the need
    (3, None, 16, 8), (3, 8, 16, 8),  # a range of 16 rows has no 24 to list
    (9, 1, 16, None), (25, 1, 32, None), (1, None, 3, None)])
def test_which_capacity_a_step_takes(entering, need, tokens, wanted):
    graphs = SimpleNamespace(capacities=(4, 8, 24))
    assert SalientSteps(graphs)._sparse_graph(entering, need, tokens) == wanted


@pytest.mark.parametrize("kind", ["dense", "block"])
def test_several_capacities_are_the_dynamic_result(kind, monkeypatch):
    """A row more or less that only fills changes nothing; what is salient decides which graph runs."""
    ran = []

    class Several(EagerSalient):
        def __init__(self, model, capacity):
            super().__init__(model, capacity)
            self.capacities = (2, 4, 8)

        def compute(self, graph, *others):
            ran.append(graph)
            return super().compute(graph, *others)

    (dynamic, own), = decode(kind, [PROMPTS[2]], salient_threshold=0.9)
    monkeypatch.setattr("dmoe_export.model.backend.EagerSalient", Several)
    (fixed, stats), = decode(kind, [PROMPTS[2]], salient_threshold=0.9)
    assert fixed == dynamic and stats.salient_overflows == 0
    assert stats.salient_by_step == own.salient_by_step
    assert len(set(ran)) >= 3 and set(ran) <= {"fill", 2, 4, 8}


def test_a_drifting_row_is_caught_by_refreshing():
    """Rows that move a little at every step are never below the threshold; their error grows until a dense step."""
    model = BACKENDS["dense"]
    errors = {}
    for interval in (None, 3):
        canvas, steps = np.full((1, 24), MASK), SalientSteps(model.salient_graphs(None))
        rng, distances = np.random.default_rng(0), []
        for number in range(8):
            canvas = canvas.copy()
            canvas[0, 8 + number] = rng.integers(0, 50)
            asked = np.arange(24)[None]
            inputs = ForwardInputs(canvas, np.arange(24)[None], asked, {}, want_logits=True)
            dense = number == 0 or (interval is not None and number % interval == 0)
            got, (result,) = steps.forward(inputs, model.new_cache(1), [0], [0], [SalientStep(0.5, 0, dense)])
            exact = model.forward(inputs, model.new_cache(1))
            assert got.logits is not None and exact.logits is not None and result is not None
            assert dense or not result.salient.any()  # nothing ever triggers
            distances.append(float(np.abs(got.logits - exact.logits).max()))
        errors[interval] = distances
    assert errors[None][-1] > 0.05 and errors[None][1:] != sorted(errors[None][1:], reverse=True)
    assert all(errors[3][i] < 1e-4 for i in (0, 3, 6))
    assert errors[3][-1] < errors[None][-1]


def test_few_rows_are_salient_and_few_experts_used():
    (_, plain), = decode("block", [PROMPTS[2]], steps=8)
    (_, sparse), = decode("block", [PROMPTS[2]], steps=8, salient_threshold=0.9)
    assert sparse.salient_rows is not None and 0 < sparse.salient_rows < 8
    assert sparse.unique_experts < plain.unique_experts
    assert sparse.as_dict()["salient_rows"] == sparse.salient_rows


@pytest.mark.parametrize("kind, options, message", [
    ("dense", {"cache": "prefix"}, "Cache prefix and salient steps exclude"),
    ("block", {"cache": "none"}, "use cache auto or block"),
    ("dense", {"salient_threshold": 3.0}, "salient_threshold is 3.0"),
    ("dense", {"salient_threshold": 0.9, "refresh_interval": 0}, "refresh_interval is 0"),
    ("dense", {"salient_threshold": None, "full_steps": 3}, "full_steps belongs to salient steps"),
])
def test_refused(kind, options, message):
    with pytest.raises(RequestError, match=message):
        decode(kind, PROMPTS, **({"salient_threshold": 0.99} | options))


def test_a_backend_without_salient_steps_is_refused():
    class Plain:
        name = "plain"
        description, routing, limits = BACKENDS["dense"].description, BACKENDS["dense"].routing, None
        opens_blocks = False

    with pytest.raises(RequestError, match="Backend plain runs no salient steps"):
        BlockDiffusion(Plain(), DecodeSettings(salient_threshold=0.9))  # type: ignore[arg-type]
