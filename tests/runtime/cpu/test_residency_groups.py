"""The CPU tier by itself: groups within the budget, whatever is asked for, moved and refused."""

from __future__ import annotations

import errno
import itertools
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from cpu_ops_helpers import built
from hypothesis import given, settings
from hypothesis import strategies as st
from source_helpers import ACQUIRE, RELEASE

from dmoe_export.errors import BundleError, MissingRequirementError
from dmoe_export.runtime.cpu import expert_file
from dmoe_export.runtime.cpu.mapped_experts import MappedExperts
from dmoe_export.runtime.cpu.mapped_memory import FileIdentity
from dmoe_export.runtime.expert_layout import ExpertTensor
from dmoe_export.runtime.residency.policy import Move

pytestmark = [pytest.mark.skipif(sys.platform != "linux", reason="the tier is Linux's"),
              pytest.mark.usefixtures("our_kernels")]
LAYERS, EXPERTS, HIDDEN, WIDTH = 3, 8, 64, 16  # slabs of 8192 and 4096 bytes
EACH = 3 * HIDDEN * WIDTH * 4
SLABS = 2 * EACH // 3 * EXPERTS, EACH // 3 * EXPERTS


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tier") / "experts.bin"
    np.random.default_rng(0).standard_normal(LAYERS * EXPERTS * EACH // 4, np.float32).tofile(path)
    return path


def _tier(path, capacity):
    shapes = (EXPERTS, 2 * WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH)
    layers = [[ExpertTensor(f"{layer}.{place}", layer * sum(SLABS) + place * SLABS[0], SLABS[place] // EXPERTS,
                            np.dtype(np.float32), shape)
               for place, shape in enumerate(shapes)] for layer in range(LAYERS)]
    return MappedExperts(built(), path, layers, capacity * EACH + EACH // 2)


def _in_memory(tier):
    return tier.states() % 2 == 1


def _groups(tier, layer, experts):
    """As the experts op asks: what is held together, until all were."""
    acquire = ACQUIRE(tier.source.acquire)
    release = RELEASE(tier.source.release)
    layer_is = tier.source.context, tier.weights[f"{layer}.0"].ctypes.data
    left = np.array(experts, np.int32)
    while len(left):
        count = acquire(*layer_is, left.ctypes.data, len(left))
        if count <= 0:
            raise LostError
        try:
            yield left[:count].copy()
        finally:
            release(*layer_is, left.ctypes.data, count)
        left = left[count:].copy()


class LostError(Exception):
    """The source gave up."""


_SETS = st.sets(st.integers(0, EXPERTS - 1), min_size=1).map(sorted)
_STEPS = st.lists(st.tuples(st.sampled_from(["use", "move"]), st.integers(0, LAYERS - 1), _SETS), max_size=12)


@settings(max_examples=15, deadline=None)
@given(capacity=st.integers(1, LAYERS * EXPERTS), steps=_STEPS)
def test_each_expert_once_within_the_budget(file, capacity, steps):
    tier, identity = _tier(file, capacity), FileIdentity.of(file)
    residents = np.zeros((LAYERS, EXPERTS), bool)
    for what, layer, experts in steps:
        if what == "move":  # as the policy: at most seven eighths of the budget are residents
            fresh = np.array([e for e in experts if not residents[layer, e]], int)[:max(0, capacity * 7 // 8
                                                                                         - residents.sum())]
            leave = np.flatnonzero(residents[layer])[:len(fresh)]
            residents[layer, leave], residents[layer, fresh] = False, True
            tier.move([Move(layer, fresh, np.append(leave, np.full(len(fresh) - len(leave), -1)))])
            tier.wait()
            assert _in_memory(tier)[residents].all()  # there was room for every one
            assert ((tier.states() & 2 > 0) == residents).all()
            continue
        before = _in_memory(tier)[layer]
        seen = []
        for group in _groups(tier, layer, experts):
            assert len(group) and _in_memory(tier)[layer, group].all()
            assert np.flatnonzero(tier.states()[layer] & 4).tolist() == sorted(group)
            for place in range(2):
                tier.weights[f"{layer}.{place}"][group].sum()
            assert identity.resident_bytes() == _in_memory(tier).sum() * EACH <= capacity * EACH
            seen.append(group.tolist())
        assert sorted(itertools.chain(*seen)) == experts
        if before[experts].any():
            assert seen[0] == np.array(experts)[before[experts]].tolist()  # those in memory first
        assert _in_memory(tier)[residents].all() or capacity <= residents.sum()
    assert (tier.states() < 4).all() and tier.figures()["peak_bytes"] <= capacity * EACH
    tier.close()


def test_the_longest_unused_leaves_first(file):
    tier = _tier(file, 4)
    for expert in (0, 1, 2, 3, 0, 4):
        list(_groups(tier, 0, [expert]))
    assert np.flatnonzero(_in_memory(tier)[0]).tolist() == [0, 2, 3, 4]
    tier.move([Move(0, np.array([2]), np.array([-1]))])
    list(_groups(tier, 1, [5, 6, 7]))
    assert np.flatnonzero(_in_memory(tier)[0]).tolist() == [2]  # a resident stays
    assert tier.figures()["missed_bytes"] == 8 * EACH and tier.figures()["dropped_bytes"] == 4 * EACH
    assert tier.costs().miss > 0
    tier.close()


def test_a_group_is_as_large_as_the_room(file):
    tier = _tier(file, 4)
    assert [group.tolist() for group in _groups(tier, 0, range(8))] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    tier.move([Move(0, np.arange(3), np.full(3, -1))])  # the room that residents leave
    tier.wait()
    assert [group.tolist() for group in _groups(tier, 1, range(3))] == [[0], [1], [2]]
    tier.close()


def test_nobody_asks_for_an_unknown_layer_or_nothing(file):
    tier, expert = _tier(file, 2), np.zeros(1, np.int32)
    acquire = ACQUIRE(tier.source.acquire)
    assert acquire(tier.source.context, tier.weights["0.1"].ctypes.data, expert.ctypes.data, 1) == -1
    assert acquire(tier.source.context, tier.weights["0.0"].ctypes.data, expert.ctypes.data, 0) == -1
    tier.close()


def test_an_abandoned_group_is_free_again(file):
    tier = _tier(file, 2)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            for _ in _groups(tier, 0, range(8)):
                raise ZeroDivisionError
    assert (tier.states() < 4).all()
    tier.close()


def test_threads_wait_for_each_other(file):
    tier, wrong = _tier(file, 2), []

    def work(layer):
        random = np.random.default_rng(layer)
        for _ in range(60):
            experts = np.unique(random.integers(0, EXPERTS, 5))
            done = []
            for group in _groups(tier, layer, experts):
                there = _in_memory(tier)
                if not there[layer, group].all() or there.sum() > 2:
                    wrong.append(group)
                done += group.tolist()
            if sorted(done) != experts.tolist():
                wrong.append(done)

    threads = [threading.Thread(target=work, args=(layer,), daemon=True) for layer in range(LAYERS)]
    for thread in threads:
        thread.start()
    for i in range(40):
        tier.move([Move(i % LAYERS, np.array([i % EXPERTS]), np.array([(i - LAYERS) % EXPERTS]))])
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads) and not wrong
    tier.wait()
    assert (tier.states() < 4).all()
    tier.close()


def test_it_may_be_closed_at_any_moment(file):
    """Also while others acquire and the policy moves; nobody hangs, what is asked for still comes."""
    for seed in range(8):
        tier, done = _tier(file, 3), []

        def work(layer, tier=tier, done=done):
            for _ in range(20):
                done.append(sum(len(group) for group in _groups(tier, layer, range(EXPERTS))))

        threads = [threading.Thread(target=work, args=(layer,), daemon=True) for layer in range(LAYERS)]
        for thread in threads:
            thread.start()
        for i in range(seed * 3):
            tier.move([Move(i % LAYERS, np.array([i % EXPERTS]), np.array([-1]))])
        tier.close()
        tier.move([Move(0, np.array([1]), np.array([-1]))])
        tier.wait()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads) and done == [EXPERTS] * 20 * LAYERS


def test_a_file_cut_short_in_the_middle_is_told(file, tmp_path):
    """No page of it is touched: that would end the process."""
    path = tmp_path / "experts.bin"
    path.write_bytes(file.read_bytes())
    tier = _tier(path, 2)
    groups = _groups(tier, 2, range(8))
    next(groups)
    os.truncate(path, EACH)
    with pytest.raises(LostError):
        next(groups)
    assert (tier.states() < 4).all()
    tier.move([Move(2, np.array([7]), np.array([-1]))])
    tier.wait()  # the background meets it as well, silently
    with pytest.raises(BundleError, match="changed or removed"):
        tier.check()
    tier.close()


def _no_memory(*arguments):
    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


def test_a_file_that_is_gone_before_it_is_mapped_is_told(file, tmp_path):
    path = tmp_path / "experts.bin"
    path.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(BundleError, match="changed or removed"):
        _tier(path, 2)
    path.unlink()
    with pytest.raises(BundleError, match="changed or removed"):
        _tier(path, 2)


def test_what_a_system_may_refuse(file, monkeypatch):
    monkeypatch.setattr(expert_file.mmap, "mmap", _no_memory)
    with pytest.raises(MissingRequirementError, match=r"cannot be mapped \(Cannot allocate memory\); raise the limit"):
        _tier(file, 3)
    monkeypatch.undo()
    advise = expert_file.advise
    monkeypatch.setattr(expert_file, "advise", lambda *a: a[2] != expert_file.DONTDUMP and advise(*a))
    with pytest.raises(MissingRequirementError, match=r"48 mappings of experts apart; raise vm\.max_map_count"):
        _tier(file, 3)
    monkeypatch.undo()
    monkeypatch.setattr(expert_file, "PAGE", 65536)
    with pytest.raises(MissingRequirementError, match="no whole memory pages of 65536"):
        _tier(file, 3)


_OLD_KERNEL = """
import ctypes, platform, sys
from pathlib import Path
sys.path[:0] = {path!r}
libc = ctypes.CDLL(None)
madvise, step = dict(x86_64=28, aarch64=233)[platform.machine()], ctypes.c_uint64
def instruction(code, yes, no, k):
    return step(code | yes << 16 | no << 24 | k << 32)
program = (step * 6)(instruction(0x20, 0, 0, 0), instruction(0x15, 0, 3, madvise),  # the call's number
                     instruction(0x20, 0, 0, 32), instruction(0x15, 0, 1, 22),  # its third argument: POPULATE_READ
                     instruction(0x06, 0, 0, 0x50016), instruction(0x06, 0, 0, 0x7FFF0000))  # EINVAL, else as ever
class Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("program", ctypes.c_void_p)]
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.byref(Filter(6, ctypes.addressof(program))), 0, 0):
    sys.exit(77)
import test_residency_groups as t
from dmoe_export.runtime.cpu.mapped_memory import POPULATE_READ, advise
path = Path({file!r})
tier = t._tier(path, 3)
assert not advise(tier.weights["0.0"].ctypes.data, 4096, POPULATE_READ)
for group in t._groups(tier, 1, [1, 4, 6]):
    assert t.FileIdentity.of(path).resident_bytes() == 3 * t.EACH
t.os.truncate(path, t.EACH)
try:
    list(t._groups(tier, 2, [7]))
except t.LostError:
    print("told")
"""


def test_without_populate_pages_are_touched(file, tmp_path):
    """Linux before 5.14, as a filter of system calls plays it; a page that is lost meanwhile ends no process."""
    path = tmp_path / "experts.bin"
    path.write_bytes(file.read_bytes())
    done = subprocess.run([sys.executable, "-c", _OLD_KERNEL.format(path=sys.path, file=str(path))], text=True,
                          capture_output=True, timeout=100, check=False)
    if done.returncode == 77:
        pytest.skip("this system takes no filter of system calls")
    assert (done.returncode, done.stdout) == (0, "told\n"), done.stderr
