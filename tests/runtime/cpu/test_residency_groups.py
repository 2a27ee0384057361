"""The CPU tier by itself: groups within the budget, whatever is asked for, moved and refused."""

from __future__ import annotations

import errno
import itertools
import os
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmoe_export.errors import BundleError, MissingRequirementError
from dmoe_export.runtime.cpu import mapped_experts
from dmoe_export.runtime.cpu.expert_layout import ExpertTensor
from dmoe_export.runtime.cpu.mapped_experts import MappedExperts
from dmoe_export.runtime.cpu.mapped_memory import FileIdentity
from dmoe_export.runtime.residency.policy import Move

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the tier is Linux's")
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
    layers = [[ExpertTensor(layer * sum(SLABS) + place * SLABS[0], SLABS[place] // EXPERTS, np.dtype(np.float32), shape)
               for place, shape in enumerate(shapes)] for layer in range(LAYERS)]
    return MappedExperts(path, layers, capacity * EACH + EACH // 2)


_SETS = st.sets(st.integers(0, EXPERTS - 1), min_size=1).map(sorted)
_STEPS = st.lists(st.tuples(st.sampled_from(["use", "move"]), st.integers(0, LAYERS - 1), _SETS), max_size=12)


@settings(max_examples=30, deadline=None)
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
            assert tier._mapped[residents].all()  # there was room for every one
            continue
        before = tier._mapped[layer].copy()
        seen = []
        for group in tier.groups(layer, np.array(experts)):
            assert len(group) and tier._mapped[layer, group].all()
            for tensor in tier.weights(layer):
                tensor[group].sum()
            assert identity.resident_bytes() == tier._mapped.sum() * EACH <= capacity * EACH
            seen.append(group.tolist())
        assert sorted(itertools.chain(*seen)) == experts
        if before[experts].any():
            assert seen[0] == np.array(experts)[before[experts]].tolist()  # those in memory first
        assert tier._mapped[residents].all() or capacity <= residents.sum()
    assert not tier._held.any() and tier.totals.peak_bytes <= capacity * EACH
    tier.close()


def test_the_longest_unused_leaves_first(file):
    tier = _tier(file, 4)
    for expert in (0, 1, 2, 3, 0, 4):
        list(tier.groups(0, np.array([expert])))
    assert np.flatnonzero(tier._mapped[0]).tolist() == [0, 2, 3, 4]
    tier.move([Move(0, np.array([2]), np.array([-1]))])
    list(tier.groups(1, np.array([5, 6, 7])))
    assert np.flatnonzero(tier._mapped[0]).tolist() == [2]  # a resident stays
    assert tier.totals.missed_bytes == 8 * EACH and tier.totals.dropped_bytes == 4 * EACH
    assert tier.costs().miss > 0
    tier.close()


def test_groups_are_spread_over_the_experts(file):
    """ONNX Runtime gives each thread a range of expert ids."""
    tier = _tier(file, 4)
    assert [group.tolist() for group in tier.groups(0, np.arange(8))] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    tier.close()


def test_an_abandoned_group_is_free_again(file):
    tier = _tier(file, 2)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            for _ in tier.groups(0, np.arange(8)):
                raise ZeroDivisionError
    assert not tier._held.any()
    tier.close()


def test_threads_wait_for_each_other(file):
    tier, wrong = _tier(file, 2), []

    def work(layer):
        random = np.random.default_rng(layer)
        for _ in range(60):
            experts = np.unique(random.integers(0, EXPERTS, 5))
            done = []
            for group in tier.groups(layer, experts):
                with tier._changed:
                    if not tier._mapped[layer, group].all() or tier._mapped.sum() > 2:
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
    assert not tier._held.any()
    tier.close()


def test_a_file_cut_short_in_the_middle_is_told(file, tmp_path):
    """No page of it is touched: that would end the process."""
    path = tmp_path / "experts.bin"
    path.write_bytes(file.read_bytes())
    tier = _tier(path, 2)
    groups = tier.groups(2, np.arange(8))
    next(groups)
    os.truncate(path, EACH)
    with pytest.raises(BundleError, match="changed or removed"):
        next(groups)
    tier.move([Move(2, np.array([7]), np.array([-1]))])
    tier.wait()  # the background meets it as well, silently
    with pytest.raises(BundleError, match="changed or removed"):
        tier.check()
    tier.close()


def test_without_populate_pages_are_touched(file, monkeypatch):
    """Linux before 5.14."""
    advise = mapped_experts.advise
    monkeypatch.setattr(mapped_experts, "advise", lambda *a: a[2] != mapped_experts.POPULATE_READ and advise(*a))
    tier = _tier(file, 3)
    for _ in tier.groups(1, np.array([1, 4, 6])):
        assert FileIdentity.of(file).resident_bytes() == 3 * EACH
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
    monkeypatch.setattr(mapped_experts.mmap, "mmap", _no_memory)
    with pytest.raises(MissingRequirementError, match=r"cannot be mapped \(Cannot allocate memory\); raise the limit"):
        _tier(file, 3)
    monkeypatch.undo()
    advise = mapped_experts.advise
    monkeypatch.setattr(mapped_experts, "advise", lambda *a: a[2] != mapped_experts.DONTDUMP and advise(*a))
    with pytest.raises(MissingRequirementError, match=r"48 mappings of experts apart; raise vm\.max_map_count"):
        _tier(file, 3)
    monkeypatch.undo()
    monkeypatch.setattr(mapped_experts, "PAGE", 65536)
    with pytest.raises(MissingRequirementError, match="no whole memory pages of 65536"):
        _tier(file, 3)
