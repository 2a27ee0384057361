"""The thread that owns a batch: order, limits, ends and failures, over a toy whose forwards the test lets through."""

from __future__ import annotations

import asyncio
import pickle
import threading
from contextlib import contextmanager

import pytest
from serving import Held, toy_generator
from toy_backend import EOS, VOCAB

from dmoe_export.decoding.telemetry import Statistics
from dmoe_export.decoding.template import Gap
from dmoe_export.errors import NotFiniteError
from dmoe_export.serving.asked import Ask, Course, Piece
from dmoe_export.serving.engine import Engine
from dmoe_export.serving.errors import ApiError
from dmoe_export.serving.metrics import Metrics

LONG = {"max_new_tokens": 40, "eos_id": -1}


@contextmanager
def engine_of(slots=2, max_waiting=4):
    backend = Held()
    engine = Engine("toy", toy_generator(backend), slots, max_waiting, Metrics())
    try:
        yield engine, backend
    finally:
        backend.free.set()
        engine.end_all()
        engine.close()


def submit(engine, name, prompt=(5, 6, 7), n=1, timeout=30.0, watched=False, gone=None, **options):
    return engine.enter(Ask((-1, name), [list(prompt)], False, LONG | options, n, timeout, watched), gone)


async def pieces(job):
    return [item async for item in job.items()]


async def answer(job):
    """(tokens of each choice, finish reasons)"""
    tokens, reasons = {}, {}
    for piece in await pieces(job):
        tokens.setdefault(piece.choice, []).extend(piece.token_ids)
        if piece.finish_reason:
            reasons[piece.choice] = piece.finish_reason
    return tokens, reasons


def offline(prompt=(5, 6, 7), index=0, **options):
    backend = Held()
    backend.free.set()
    generator = toy_generator(backend)
    return generator.generate([list(prompt)] * (index + 1), **LONG | options)[index].token_ids


def metric(engine, name):
    return next(float(line.split()[-1]) for line in engine._metrics.text().decode().splitlines()
                if line.startswith(f"{name}{{"))


def test_requests_beyond_the_slots_wait_and_join_in_order():
    async def main(engine, backend):
        jobs = [await submit(engine, f"{i}", prompt=(i + 3, 4)) for i in range(5)]
        backend.free.set()
        answers = await asyncio.gather(*map(answer, jobs))
        for i, (tokens, reasons) in enumerate(answers):
            assert tokens == {0: offline((i + 3, 4))} and reasons == {0: "length"}
        begun = [job.entered + job.course.queue_seconds for job in jobs]
        assert begun == sorted(begun) and begun[2] > min(j.entered + j.course.first_block_seconds for j in jobs[:2])

    with engine_of() as (engine, backend):
        asyncio.run(main(engine, backend))
        assert engine.busy == 0 and not engine.jobs and metric(engine, "dmoe_running_rows") == 0
        assert max(len(inputs.input_ids) for inputs in backend.seen) == 2


def test_a_request_of_many_answers_leaves_places_to_those_that_came_after():
    async def main(engine, backend):
        many = await submit(engine, "many", n=9, temperature=1.0)
        others = [await submit(engine, f"{i}", prompt=(i + 3, 4)) for i in range(2)]
        backend.free.set()
        tokens, _ = await answer(many)
        assert tokens == {i: offline(index=i, temperature=1.0) for i in range(9)}
        for i, job in enumerate(others):
            assert await answer(job) == ({0: offline((i + 3, 4))}, {0: "length"})
            assert job.over < many.over

    with engine_of() as (engine, backend):
        asyncio.run(main(engine, backend))
        assert engine.busy == 0 and metric(engine, "dmoe_waiting_rows") == 0


def test_a_text_with_gaps_that_ends_while_it_waits_is_its_prompt():
    async def main(engine, backend):
        first = await submit(engine, "first")
        second = await engine.enter(Ask((-1, "second"), [[[5, 6], Gap(4), [7]]], False, {}, 2, shows="text"))
        second.cancel("cancelled")
        backend.free.set()
        await answer(first)
        for choice, piece in enumerate(await pieces(second)):
            assert (piece.choice, piece.token_ids, piece.given, piece.finish_reason) == (choice, [5, 6], 2, "cancelled")
            assert piece.gaps == [{"token_ids": [], "text": None, "in_sight": 1, "text_offset": None}]
        assert second.course.prompt_tokens == 3

    with engine_of(slots=1) as (engine, backend):
        asyncio.run(main(engine, backend))


def test_a_full_queue_refuses_and_takes_requests_again_later():
    async def main(engine, backend):
        jobs = [await submit(engine, f"{i}") for i in range(3)]
        with pytest.raises(ApiError, match="the most it takes") as caught:
            await submit(engine, "late")
        assert caught.value.status_code == 429 and 1 <= int(caught.value.headers["retry-after"]) <= 60
        backend.free.set()
        await asyncio.gather(*map(answer, jobs))
        assert (await answer(await submit(engine, "late")))[1] == {0: "length"}

    with engine_of(max_waiting=1) as (engine, backend):
        asyncio.run(main(engine, backend))


def test_choices_draw_as_rows_of_one_batch_do_and_without_chance_are_decoded_once():
    async def main(engine, backend):
        backend.free.set()
        tokens, _ = await answer(await submit(engine, "a", n=3, temperature=1.0, seed=7))
        assert tokens == {i: offline(index=i, temperature=1.0, seed=7) for i in range(3)}
        assert len({tuple(one) for one in tokens.values()}) == 3
        forwards = len(backend.seen)
        one = await submit(engine, "b")
        await answer(one)
        alone = len(backend.seen) - forwards
        same = await submit(engine, "c", n=3)
        tokens, reasons = await answer(same)
        assert len(same.rows) == 1 and tokens == dict.fromkeys(range(3), offline()) and len(reasons) == 3
        assert len(backend.seen) - forwards == 2 * alone

    with engine_of() as (engine, backend):
        asyncio.run(main(engine, backend))


def test_a_cancelled_request_ends_at_the_next_step_and_its_neighbour_does_not_notice():
    async def main(engine, backend):
        gone, stays, waiting = [await submit(engine, name) for name in ("gone", "stays", "waiting")]
        gone.cancel("cancelled")
        waiting.cancel("disconnected")
        backend.free.set()
        assert (await answer(gone))[1] == {0: "cancelled"}
        assert (await answer(stays)) == ({0: offline()}, {0: "length"})
        assert (await answer(waiting)) == ({0: []}, {0: "cancelled"})
        gone.cancel("cancelled")  # of an ended one: nothing

    with engine_of() as (engine, backend):
        asyncio.run(main(engine, backend))
        assert engine.busy == 0


def test_a_client_that_is_gone_ends_its_request_before_the_next_forward():
    async def main(engine, backend):
        left = threading.Event()
        jobs = [await submit(engine, "runs", gone=left.is_set), await submit(engine, "stays"),
                await submit(engine, "waits", gone=left.is_set)]
        left.set()
        backend.free.set()
        (_, ran), stayed, (tokens, waited) = [await answer(job) for job in jobs]
        assert ran == waited == {0: "cancelled"} and tokens == {0: []}
        assert [job.ending for job in jobs] == ["disconnected", None, "disconnected"]
        assert stayed == ({0: offline()}, {0: "length"})

    with engine_of() as (engine, backend):
        asyncio.run(main(engine, backend))
        assert engine.busy == 0


def test_what_crosses_between_processes_pickles():
    error = ApiError(429, "Full.", param="n", code="queue_full", headers={"retry-after": "5"})
    same = pickle.loads(pickle.dumps(error))
    assert (same.body, same.status_code, same.headers) == (error.body, 429, error.headers)
    ask = Ask((-1, "x"), [[1, 2]], False, {"threshold": 0.5})
    piece = Piece(0, [1], "a", "length", Statistics(2, 1))
    course = Course(2, 0, [Statistics(2, 1)], 0.1, 0.2)
    assert pickle.loads(pickle.dumps((ask, piece, course))) == (ask, piece, course)


def test_time_runs_while_a_request_waits_and_while_it_is_decoded():
    async def main(engine, backend):
        running, waiting = await submit(engine, "running", timeout=0.2), await submit(engine, "waiting", timeout=0.2)
        await asyncio.sleep(0.3)
        backend.free.set()
        assert (await answer(running))[1] == {0: "timeout"}
        with pytest.raises(ApiError, match="No place in the batch") as caught:
            await answer(waiting)
        assert caught.value.status_code == 503 and caught.value.code == "timeout"

    with engine_of(slots=1) as (engine, backend):
        asyncio.run(main(engine, backend))


def test_a_bad_request_is_refused_before_it_waits_and_names_no_folder():
    async def main(engine, backend):
        for prompt, options, words in (((99,), {}, "outside the vocabulary"), ((), {}, "is empty"),
                                       ((5,), {"threshold": 3}, "threshold is 3"),
                                       ((5,), {"max_new_tokens": 3000}, "positions"),
                                       ((5,), {"stop": "x"}, "toy has no tokenizer")):
            with pytest.raises(ApiError, match=words) as caught:
                await submit(engine, "bad", prompt=prompt, **options)
            assert caught.value.status_code == 400 and "somewhere" not in caught.value.detail
        assert engine.busy == 0

    with engine_of(max_waiting=0) as (engine, backend):
        asyncio.run(main(engine, backend))


def test_an_id_in_use_is_refused_even_while_its_request_is_encoded():
    async def main(engine, backend):
        both = await asyncio.gather(submit(engine, "x"), submit(engine, "x"), return_exceptions=True)
        assert [isinstance(one, ApiError) for one in both] == [False, True]

    with engine_of() as (engine, backend):
        asyncio.run(main(engine, backend))


def test_numbers_that_are_not_finite_are_told_to_both_sides(caplog):
    async def main(engine, backend):
        backend.fail = NotFiniteError("Prompt 0 gets no answer.")
        backend.free.set()
        with pytest.raises(ApiError, match="gets no answer") as caught:
            await answer(await submit(engine, "x"))
        assert caught.value.status_code == 500 and caught.value.code == "model_error"

    with engine_of() as (engine, backend):
        asyncio.run(main(engine, backend))
        assert engine.alive and not engine.worker.broken
    assert "request x failed: Prompt 0 gets no answer." in caplog.text


def test_a_failed_forward_ends_its_requests_and_the_engine_goes_on(caplog):
    async def main(engine, backend):
        backend.fail = ValueError("the secret prompt")
        backend.free.set()
        for _ in range(2):
            with pytest.raises(ApiError) as caught:
                await answer(await submit(engine, "x", n=2, temperature=1.0))
            assert caught.value.status_code == 500 and "secret" not in caught.value.detail
        backend.fail = None
        assert (await answer(await submit(engine, "y")))[0] == {0: offline()}

    with engine_of() as (engine, backend):
        asyncio.run(main(engine, backend))
        assert engine.busy == 0 and engine.alive
    assert "ValueError at serving.py:" in caplog.text and "secret" not in caplog.text


def test_a_row_whose_forward_fails_ends_alone():
    """Three in one batch; every forward fails that has a token of the second one, which the others never hold."""
    short = {"max_new_tokens": 12}
    wanted = [offline((5, 6, 7), **short), offline((8, 6, 7), **short)]
    bad = next(token for token in range(9, VOCAB) if token not in wanted[0] + wanted[1])

    async def main():
        with engine_of(slots=3) as (engine, backend):
            inner = backend.forward
            backend.forward = lambda inputs, cache: 1 / 0 if (inputs.input_ids == bad).any() else inner(inputs, cache)
            jobs = [await submit(engine, f"r{token}", prompt=(token, 6, 7), **short) for token in (5, bad, 8)]
            backend.free.set()
            with pytest.raises(ApiError) as caught:
                await pieces(jobs[1])
            assert caught.value.status_code == 500 and caught.value.code == "internal_error"
            return [(await answer(job))[0][0] for job in (jobs[0], jobs[2])]

    assert asyncio.run(main()) == wanted


@pytest.mark.parametrize("second", [True, False], ids=["a new batch", "no new batch"])
def test_a_batch_that_fails_as_a_whole_is_left(second, caplog):
    async def main(engine, backend):
        job, waiting = await submit(engine, "x"), await submit(engine, "waits")
        make = engine.generator.batch
        engine.worker._batch.step = lambda: 1 / 0
        if not second:
            engine.generator.batch = lambda **_: 1 / 0
        backend.free.set()
        with pytest.raises(ApiError) as caught:
            await answer(job)
        assert caught.value.status_code == 500
        if second:
            assert (await answer(waiting))[0] == {0: offline()}
        else:
            with pytest.raises(ApiError) as caught:
                await answer(waiting)
            engine.worker._thread.join(5)
            assert caught.value.status_code == 503 and not engine.alive
            with pytest.raises(ApiError, match="has failed"):
                await submit(engine, "late")
        engine.generator.batch = make

    with engine_of(slots=1) as (engine, backend):
        asyncio.run(main(engine, backend))
        assert engine.busy == 0


def test_a_model_that_fails_while_a_request_is_encoded_does_not_keep_it():
    async def main(engine, backend):
        encode = engine.generator.request

        def slow(*prompt, **options):
            engine.worker._ended = True
            return encode(*prompt, **options)

        engine.generator.request = slow
        with pytest.raises(ApiError, match="has failed"):
            await submit(engine, "x")
        assert engine.busy == 0 and not engine.jobs

    with engine_of() as (engine, backend):
        asyncio.run(main(engine, backend))


def test_a_draining_engine_takes_no_more_and_finishes_what_it_has():
    async def main(engine, backend):
        job = await submit(engine, "x")
        engine.drain()
        with pytest.raises(ApiError) as caught:
            await submit(engine, "y")
        assert caught.value.status_code == 503 and not engine.alive
        backend.free.set()
        assert (await answer(job))[1] == {0: "length"}

    with engine_of() as (engine, backend):
        asyncio.run(main(engine, backend))


def test_steps_are_among_the_items_in_order():
    async def main(engine, backend):
        backend.free.set()
        job = await submit(engine, "x", watched=True, eos_id=EOS)
        items = await pieces(job)
        blocks = [item["block"] if isinstance(item, dict) else "block" for item in items]
        assert isinstance(items[-1], Piece) and blocks[0] == 0 and set(blocks) > {0, "block"}
        for number in {item for item in blocks if item != "block"} - {0}:
            assert "block" in blocks[:blocks.index(number)]

    with engine_of() as (engine, backend):
        asyncio.run(main(engine, backend))
