"""Answers that outlive their replica, without Ray: replicas of this process, lost where a test says so."""

from __future__ import annotations

import asyncio
import dataclasses
import pickle
import time
from contextlib import suppress

import pytest
from serving import Held, toy_generator

from dmoe_export.decoding.template import Gap
from dmoe_export.serving.asked import Ask, Course, Piece
from dmoe_export.serving.engine import Engine
from dmoe_export.serving.errors import ApiError
from dmoe_export.serving.metrics import Metrics
from dmoe_export.serving.ray import answer as ray_answer
from dmoe_export.serving.ray import replica as ray_replica
from dmoe_export.serving.ray.remote import RemoteModel
from dmoe_export.serving.ray.replay import DiffersError, Replay
from dmoe_export.serving.ray.replica import Replica
from dmoe_export.serving.ray.settings import Settings
from dmoe_export.serving.ray.wire import FullError, LostError, NobodyError

LONG = {"max_new_tokens": 40, "eos_id": -1}


class LocalStream:
    """Items of a replica of this process; lost after so many, counted in the wire."""

    def __init__(self, wire, ask):
        self.wire, self.left = wire, wire.lives.pop(0) if wire.lives else None
        self.items = wire.replica.answer(ask)
        self.cancelled = False

    async def next(self):
        if isinstance(self.left, Exception):
            raise self.left
        if self.left == 0:
            await self.items.aclose()
            raise LostError("ActorDiedError")
        if self.left is not None:
            self.left -= 1
        return await self.items.__anext__()

    def cancel(self):
        self.cancelled = True
        self.wire.tasks.append(asyncio.ensure_future(self.items.aclose()))


class LocalWire:
    """`lives`: how many items each attempt gives before its replica is lost, or what it raises at once."""

    def __init__(self, replica, lives=()):
        self.replica, self.lives, self.asked, self.told, self.tasks = replica, list(lives), [], [], []

    def ask(self, ask):
        self.asked.append(ask)
        return LocalStream(self, ask)

    async def tell(self, method, *arguments, seconds):
        self.told.append((method, *arguments))
        return [await getattr(self.replica, method)(*arguments)]


@pytest.fixture
def backend():
    made = Held()
    made.free.set()
    yield made
    made.free.set()


@pytest.fixture
def replica(backend, monkeypatch):
    def open_engine(name, bundle, *, slots, max_waiting, prefix_cache, metrics, memory, **opening):
        return Engine(name, toy_generator(backend), slots, max_waiting, metrics, prefix_cache)

    monkeypatch.setattr(ray_replica, "open_engine", open_engine)
    made = Replica(Settings(bundle="toy.bundle", max_batch=2), "toy", Metrics())
    yield made
    backend.free.set()
    made.__del__()
    del made._engine


def ask_of(name="one", **more):
    options = LONG | more.pop("options", {})
    return Ask((-1, name), [[5, 6, 7]], False, options, **more)


async def all_of(model, ask):
    answer = await model.enter(ask)
    return answer, [item async for item in answer.items()]


def tokens(items):
    return [i for item in items for i in item.token_ids]


def offline():
    backend = Held()
    backend.free.set()
    return toy_generator(backend).generate([[5, 6, 7]], **LONG)[0].token_ids


def test_an_answer_over_a_wire_is_that_of_the_engine(replica):
    model = RemoteModel("toy", LocalWire(replica))
    answer, items = asyncio.run(all_of(model, ask_of()))
    assert tokens(items) == offline() and items[-1].finish_reason == "length" and len(items) > 2
    course = answer.course
    assert course.prompt_tokens == 3 and course.statistics[0].new_tokens == 40 and model.busy == 0
    assert 0 <= course.queue_seconds <= course.first_block_seconds + 1e-3


@pytest.mark.parametrize("lives", [[0], [1], [2], [3], [1, 2], [3, 0], [2, 2]])
def test_what_a_lost_replica_had_sent_is_not_sent_again(replica, lives):
    wire = LocalWire(replica, lives)
    answer, items = asyncio.run(all_of(RemoteModel("toy", wire), ask_of()))
    assert tokens(items) == offline() and [item.finish_reason for item in items].count("length") == 1
    assert len(wire.asked) == len(lives) + 1 and answer.course.statistics[0].new_tokens == 40
    assert len({ask.key for ask in wire.asked}) == len(wire.asked)  # a lost one may still be at work
    assert wire.asked[-1].timeout <= wire.asked[0].timeout


def test_provisional_states_of_a_repeat_go_on_where_the_first_one_ended(replica, monkeypatch):
    monkeypatch.setattr("dmoe_export.serving.job.state", lambda seen, pieces: {"step": seen.step, "block": seen.block})
    alone = asyncio.run(all_of(RemoteModel("toy", LocalWire(replica)), ask_of(watched=True)))[1]
    wire = LocalWire(replica, [len(alone) // 2])
    again = asyncio.run(all_of(RemoteModel("toy", wire), ask_of(watched=True)))[1]
    assert len(wire.asked) == 2 and tokens([i for i in again if isinstance(i, Piece)]) == offline()
    assert any(isinstance(item, dict) for item in again)


GIVEN = [[5, 6, 7], Gap(20), [8, 9], Gap(3), [10]]


@pytest.mark.parametrize("lives", [[], [1], [2]])
@pytest.mark.parametrize("more", [
    {"prompts": [GIVEN], "shows": "text"}, {"template": GIVEN[1:]}, {"template": [Gap(9), [8, 9]], "shows": "gap"}],
    ids=["infill", "template", "suffix"])
def test_given_places_cross_the_wire_and_outlive_a_replica(replica, backend, lives, more):
    ask = dataclasses.replace(Ask((-1, "one"), [[5, 6, 7]], False, {}), **more)
    wire = LocalWire(replica, lives)
    answer, items = asyncio.run(all_of(RemoteModel("toy", wire), pickle.loads(pickle.dumps(ask))))
    wanted = toy_generator(backend).infill([[5, 6, 7], Gap(9), [8, 9]] if ask.shows == "gap" else GIVEN)[0]
    assert [gap["token_ids"] for gap in items[-1].gaps] == [gap.token_ids for gap in wanted.gaps]
    ids = {"text": [5, 6, 7, *wanted.answer.token_ids], "answer": wanted.answer.token_ids,
           "gap": wanted.gaps[0].token_ids}[ask.shows]
    assert tokens(items) == ids and items[-1].finish_reason == "filled"
    assert sum(len(item.token_ids) - item.given for item in items) == (9 if ask.shows == "gap" else 23)
    assert answer.course.prompt_tokens == (5 if ask.shows == "gap" else 6) and len(wire.asked) == len(lives) + 1


@pytest.mark.parametrize("lives", [[0, 0, 0], [2, 1, 3, 9]])
def test_a_request_that_kills_its_replicas_kills_three_at_most(replica, lives):
    wire = LocalWire(replica, lives)
    with pytest.raises(ApiError) as error:
        asyncio.run(all_of(RemoteModel("toy", wire), ask_of()))
    assert (error.value.status_code, error.value.code) == (503, "replica_lost") and error.value.headers["retry-after"]
    assert len(wire.asked) == 3


def test_a_repeat_that_differs_is_an_error_and_not_a_mixed_answer(replica, backend):
    wire = LocalWire(replica, [2])
    first = wire.ask

    def another(ask):
        if wire.asked:  # as another bundle would answer
            ask = dataclasses.replace(ask, prompts=[[9, 9, 9]])
        return first(ask)

    wire.ask = another
    got = []

    async def read():
        answer = await RemoteModel("toy", wire).enter(ask_of())
        async for item in answer.items():
            got.append(item)

    with pytest.raises(ApiError) as error:
        asyncio.run(read())
    assert error.value.code == "replica_lost" and "otherwise" in error.value.detail and len(got) == 1


def test_a_refused_request_is_not_asked_again(replica):
    wire = LocalWire(replica)
    with pytest.raises(ApiError) as error:
        asyncio.run(all_of(RemoteModel("toy", wire), ask_of(options={"steps": -1})))
    assert error.value.status_code == 400 and len(wire.asked) == 1


def test_a_full_queue_is_429_at_first_and_a_lost_replica_later(replica):
    for lives, status, code in (([FullError()], 429, "queue_full"), ([2, FullError()], 503, "replica_lost"),
                                ([NobodyError()], 503, "no_replica")):
        model = RemoteModel("toy", LocalWire(replica, lives))
        with pytest.raises(ApiError) as error:
            asyncio.run(all_of(model, ask_of()))
        assert (error.value.status_code, error.value.code) == (status, code) and model.busy == 0
        assert int(error.value.headers["retry-after"]) >= 1


def test_a_replica_that_has_failed_is_left_for_another_and_replaced(replica):
    wire = LocalWire(replica)

    async def fail():
        await replica.check_health()
        replica._engine.worker.close()
        with pytest.raises(RuntimeError, match="has failed"):
            await replica.check_health()
        assert not await RemoteModel("toy", wire).ready()
        await all_of(RemoteModel("toy", wire), ask_of())

    with pytest.raises(ApiError) as error:
        asyncio.run(fail())
    assert error.value.code == "replica_lost" and len(wire.asked) == 3


@pytest.mark.parametrize("here", [True, False], ids=["of this process", "of another"])
def test_a_request_ends_by_its_id(replica, backend, here):
    wire = LocalWire(replica, [1] if here else [])
    model = RemoteModel("toy", wire)

    async def cancel():
        backend.free.clear()
        answer = await model.enter(ask_of())
        items = asyncio.ensure_future(anext_all(answer))
        await asyncio.sleep(0.05)
        assert await (model if here else RemoteModel("toy", wire)).cancel((-1, "one"))
        backend.free.set()
        return await items

    items = asyncio.run(cancel())
    assert items[-1].finish_reason == "cancelled" and len(tokens(items)) < 40
    assert not asyncio.run(RemoteModel("toy", wire).cancel((-1, "one")))


def test_a_cancelled_request_is_not_repeated(replica, backend):
    wire = LocalWire(replica, [2])
    model = RemoteModel("toy", wire)

    async def cancel():
        backend.free.clear()
        answer = await model.enter(ask_of())
        await model.cancel((-1, "one"))
        wire.told.clear()
        backend.free.set()
        return await anext_all(answer)

    for lives, ends in (([1], "cancelled"), ([2], "cancelled")):
        wire.lives = lives
        with suppress(ApiError):  # its replica told the end, or was lost before
            assert asyncio.run(cancel())[-1].finish_reason == ends
    assert len(wire.asked) == 2 and model.busy == 0


def test_a_client_that_leaves_before_a_replica_has_its_request_leaves_nothing(replica):
    model = RemoteModel("toy", LocalWire(replica))

    async def leave():
        entering = asyncio.ensure_future(model.enter(ask_of()))
        await asyncio.sleep(0)
        entering.cancel()
        await asyncio.gather(entering, return_exceptions=True)
        return model.busy

    assert asyncio.run(leave()) == 0


async def anext_all(answer):
    return [item async for item in answer.items()]


def test_a_client_that_leaves_frees_its_row(replica, backend):
    wire = LocalWire(replica)

    async def leave():
        backend.free.clear()
        answer = await RemoteModel("toy", wire).enter(ask_of(options={"max_new_tokens": 400}))
        reader = asyncio.ensure_future(anext_all(answer))
        await asyncio.sleep(0.05)
        reader.cancel()  # as Serve does it
        await asyncio.sleep(0.05)
        await asyncio.gather(*wire.tasks)
        backend.free.set()
        end = time.monotonic() + 10
        while replica._engine.busy and time.monotonic() < end:
            await asyncio.sleep(0.01)
        return replica._engine.busy

    assert asyncio.run(leave()) == 0 and wire.tasks


def test_the_time_of_a_request_is_over_at_the_replica_or_without_one(replica, backend, monkeypatch):
    async def wait(wire, timeout=0.2):
        return (await all_of(RemoteModel("toy", wire), ask_of(timeout=timeout)))[1]

    class Nobody(LocalStream):
        async def next(self):
            await asyncio.sleep(60)

    wire = LocalWire(replica)
    wire.ask = lambda ask: Nobody(wire, ask)
    with pytest.raises(ApiError) as error:
        asyncio.run(wait(wire))
    assert (error.value.status_code, error.value.code) == (503, "timeout")

    class Slow(LocalStream):  # taken, then silent until it is told to end
        async def next(self):
            if self.left is None:
                self.left = 9
                return Course(prompt_tokens=3)
            while not self.wire.told:
                await asyncio.sleep(0.01)
            return Piece(0, [], "", "timeout") if self.left == 9 and setattr(self, "left", 8) is None else Course()

    wire.ask = lambda ask: Slow(wire, ask)
    assert [item.finish_reason for item in asyncio.run(wait(wire))] == ["timeout"]
    assert wire.told == [("cancel", (-1, "one"), "timeout")]
    monkeypatch.setattr(ray_answer, "GRACE", 0.1)

    class Dead(Slow):  # does not even end
        async def next(self):
            return await super().next() if self.left is None else await asyncio.sleep(60)

    wire.ask = lambda ask: Dead(wire, ask)
    with pytest.raises(ApiError) as error:
        asyncio.run(wait(wire))
    assert error.value.code == "replica_lost"


def test_an_id_is_one_request_s_and_a_draining_server_takes_none(replica, backend):
    model = RemoteModel("toy", LocalWire(replica))

    async def twice():
        backend.free.clear()
        answer = await model.enter(ask_of())
        for code, status in (("request_id_in_use", 400), ("shutting_down", 503)):
            with pytest.raises(ApiError) as error:
                await model.enter(ask_of())
            assert (error.value.code, error.value.status_code) == (code, status)
            model.drain()
        assert not await model.ready()
        model.end_all()
        backend.free.set()
        return await anext_all(answer)

    assert asyncio.run(twice())[-1].finish_reason == "cancelled"


def test_facts_are_asked_once_and_their_lack_is_told(replica, monkeypatch):
    wire = LocalWire(replica)
    model = RemoteModel("toy", wire)
    monkeypatch.setattr("dmoe_export.serving.engine.model_facts", lambda name, *_: {"id": name})

    async def facts():
        return await model.facts(), await model.facts()

    first, second = asyncio.run(facts())
    assert first == second and first.block_length and wire.told == [("facts",)]
    monkeypatch.setattr("dmoe_export.serving.ray.remote._FACTS_SECONDS", 0.1)

    async def nobody(*told, seconds):
        return []

    wire.tell = nobody
    with pytest.raises(ApiError) as error:
        asyncio.run(RemoteModel("toy", wire).facts())
    assert error.value.code == "no_replica"


def test_a_replay_knows_choices_apart():
    replay, one, two, other = Replay(), Piece(0, [1], "a"), Piece(1, [2], "b"), Piece(0, [3], "c", "length")
    assert replay.is_new(one) and replay.is_new(two) and replay.caught_up
    replay.again()
    assert not replay.caught_up
    assert not replay.is_new(two) and not replay.is_new(one) and replay.caught_up and replay.is_new(other)
    replay.again()
    with pytest.raises(DiffersError):
        replay.is_new(Piece(0, [9], "a"))
