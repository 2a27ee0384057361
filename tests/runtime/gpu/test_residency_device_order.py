"""The order of table edits, copies and forwards on two streams that run whenever they like, and each rule left out."""

from __future__ import annotations

import inspect
import threading
from collections import deque
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from fake_cudart import HostDevice
from fake_tensorrt import check_slots
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dmoe_export.bundle.engine_entries import ExpertPool, WeightInput
from dmoe_export.runtime.gpu import expert_pools as device_residency
from dmoe_export.runtime.gpu.expert_pools import DeviceExperts
from dmoe_export.runtime.gpu.memory import Pool
from dmoe_export.runtime.residency.policy import Move

LAYERS, EXPERTS, SIZE = 2, 6, 64  # SIZE: bytes of a slab
NAMES = [ExpertPool(slot_of_expert=f"{i}.slots", gate_up=f"{i}.gate_up", down=f"{i}.down",
                    gate_up_pool=f"{i}.gate_up.pool", down_pool=f"{i}.down.pool") for i in range(LAYERS)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A bundle and an entry with nothing in them but experts."""
    folder = tmp_path_factory.mktemp("m")
    (folder / "experts.bin").write_bytes(np.random.default_rng(0).bytes(LAYERS * 2 * EXPERTS * SIZE))
    weights = [WeightInput(name=name, file="experts.bin", offset=i * EXPERTS * SIZE, bytes=EXPERTS * SIZE,
                           dtype="uint8", shape=[EXPERTS, SIZE])
               for i, name in enumerate(name for pool in NAMES for name in (pool.gate_up, pool.down))]
    files = [SimpleNamespace(path="experts.bin", size=LAYERS * 2 * EXPERTS * SIZE)]
    bundle = SimpleNamespace(folder=folder, manifest=SimpleNamespace(files=files, quantisation=None))
    return bundle, SimpleNamespace(expert_pools=NAMES, weight_inputs=weights)


class Machine:
    """Two streams and the tier between them."""

    def __init__(self, model, slots, sabotage=None):
        self.device = HostDevice()
        self.fake, self.stream = self.device.fake, self.device.stream()
        self.send_table = self.start = None
        if sabotage:
            sabotage(self)
        self.experts = DeviceExperts(*model, Pool(self.device), self.stream, slots, threading.RLock())
        if self.send_table:
            self.experts._send_table = partial(self.send_table, self.experts)
        if self.start:
            self.experts._start = partial(self.start, self.experts)
        self.bindings, self.checked, self.seen = self.experts.bindings, 0, []

    def forward(self):
        """Enqueue a forward, which reads table and slots when its turn on the stream comes."""
        self.experts.forward_begins()

        def read():
            feeds = {name: self.fake.view(address, int(np.prod(shape)) * (4 if name.endswith("slots") else 1)).view(
                np.int32 if name.endswith("slots") else np.uint8).reshape(shape)
                     for name, (address, shape) in self.bindings.items()}
            check_slots([pool.model_dump() for pool in NAMES], feeds)
            self.seen.append(np.stack([feeds[pool.slot_of_expert] for pool in NAMES]))
            self.checked += 1

        self.fake.enqueue(self.stream, read)

    def advance(self, side, steps):
        """A stream gets some of its operations done."""
        stream = self.experts._side if side else self.stream
        self.fake._drain(stream, self.fake.streams[stream].done + steps)

    def finish(self):
        for stream in self.fake.streams:
            self.fake._drain(stream)


def play(machine, slots, rng, steps):
    """Forwards, moves as a policy makes them, and progress of both streams, at random."""
    resident = [[] for _ in range(LAYERS)]
    forwards = 0
    for _ in range(steps):
        action = rng.integers(4)
        if action == 0:
            machine.forward()
            forwards += 1
        elif action == 1:
            moves = []
            for layer in rng.permutation(LAYERS)[:rng.integers(1, LAYERS + 1)]:
                here = resident[layer]
                absent = [e for e in range(EXPERTS) if e not in here]
                bring = rng.permutation(absent)[:rng.integers(1, slots + 1)]
                leave = rng.permutation(here)[:max(0, len(here) + len(bring) - slots)]
                resident[layer] = [e for e in here if e not in leave] + bring.tolist()
                evict = np.concatenate([np.full(len(bring) - len(leave), -1), leave]).astype(np.int64)
                moves.append(Move(int(layer), bring, evict))
            machine.experts.move(moves)
        else:
            machine.advance(action == 2, int(rng.integers(1, 12)))
    machine.experts.wait()
    machine.fake.pace = 1000
    machine.forward()
    machine.finish()
    assert machine.checked == forwards + 1
    for row, wanted in zip(machine.seen[-1], resident, strict=True):
        assert (row[wanted] >= 0).all(), "what was moved has arrived"
    assert (machine.seen[-1].max(axis=1) < slots).all()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1), slots=st.integers(1, EXPERTS - 1), batch=st.sampled_from([1, 500, 1 << 20]))
def test_every_slot_that_a_forward_may_read_is_whole(model, monkeypatch, seed, slots, batch):
    monkeypatch.setattr(device_residency, "_BATCH", batch)
    play(Machine(model, slots), slots, np.random.default_rng(seed), 60)


def _side_does_not_wait(machine):
    machine.device.follow = lambda event, stream: None


def _arrivals_are_believed(machine):
    machine.device.reached = lambda event: True


def _evictions_are_sent_with_the_next_arrival(machine):
    send = DeviceExperts._send_table

    def only_with_arrivals(experts):
        if inspect.stack()[1].function != "_start":
            send(experts)

    machine.send_table = only_with_arrivals


def _batches_do_not_wait_for_each_other(machine):
    start = DeviceExperts._start

    def eager(experts):
        before, experts._arrivals = experts._arrivals, deque()
        sent = start(experts)
        experts._arrivals.extendleft(reversed(before))
        return sent

    machine.start = eager


@pytest.mark.parametrize("sabotage", [_side_does_not_wait, _arrivals_are_believed,
                                      _evictions_are_sent_with_the_next_arrival, _batches_do_not_wait_for_each_other])
def test_each_rule_is_needed(model, sabotage):
    """Without one of them, the checks of the test above find a wrong slot."""
    with pytest.raises(AssertionError, match=r"does not hold expert|two experts in a slot"):
        for seed in range(40):
            play(Machine(model, 3, sabotage), 3, np.random.default_rng(seed), 60)


def test_a_slot_is_written_only_after_the_forwards_before_the_eviction(model):
    """Step by step: the side stream, given all the time, does not touch the slot while a forward is still enqueued."""
    machine = Machine(model, 1)
    here = np.array([0])
    machine.experts.move([Move(0, here, np.array([-1]))])
    machine.experts.wait()
    machine.fake.pace = 1000
    machine.forward()  # reads expert 0 in slot 0, later
    machine.experts.move([Move(0, np.array([4]), here)])
    assert not machine.checked
    machine.fake._drain(machine.experts._side)
    assert machine.checked == 1, "the side stream has waited for the forward"
    machine.forward()
    machine.finish()
    assert machine.seen[0][0].tolist() == [0, -1, -1, -1, -1, -1] and machine.seen[1][0].tolist() == [-1] * 4 + [0, -1]


def test_who_is_no_longer_wanted_is_not_copied(model):
    """Three moves for one slot while the first copy is on its way: the second expert is never brought."""
    machine, place = Machine(model, 1), np.array([-1])
    for expert in (0, 1, 2):
        machine.experts.move([Move(0, np.array([expert]), place)])
        place = np.array([expert])
    machine.fake._drain(machine.experts._side)
    machine.forward()
    machine.experts.wait()
    machine.forward()
    machine.finish()
    assert machine.experts.figures()["brought_bytes"] == 2 * 2 * SIZE
    assert machine.seen[-1][0].tolist() == [-1, -1, 0, -1, -1, -1]


def test_moves_without_room_for_waiting_events(model):
    """Events are used again."""
    machine = Machine(model, 1)
    before, created = np.array([-1]), []
    event = machine.device.event
    machine.device.event = lambda: created.append(1) or event()
    for step in range(20):
        machine.experts.move([Move(0, np.array([step % 2]), before)])
        machine.experts.wait()
        machine.forward()
        machine.finish()
        before = np.array([step % 2])
    assert len(created) == 1


def test_with_a_slot_for_everyone_nothing_moves(model):
    machine = Machine(model, EXPERTS)
    copies = machine.fake.calls["cudaMemcpyAsync"]
    machine.experts.move([Move(0, np.array([1]), np.array([0]))])
    machine.forward()
    machine.finish()
    assert machine.fake.calls["cudaMemcpyAsync"] == copies and machine.experts.holds_all
    assert (machine.seen[0] == np.arange(EXPERTS)).all()
