"""What a session and the library know of each other: kernels made, and the source that the experts op asks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import cpu_ops_helpers as helpers
import numpy as np
import onnxruntime as ort
import pytest
from cpu_ops_helpers import FORMATS, built, case
from linear_helpers import on_onnxruntime
from ort_ops_helpers import CPU, library, route_model
from source_helpers import as_source

from dmoe_export.errors import MissingRequirementError
from dmoe_export.ops.block_route.attributes import RouteAttributes
from dmoe_export.runtime.library import LibrarySession

ROUTE = RouteAttributes("top_p", 8, 4, 4, 2, 2.5).node_attributes()


class Source:
    """Holds a random number of random experts, and writes down what it was asked."""

    def __init__(self, seed: int = 0) -> None:
        self.rng, self.held, self.asked, self.log = np.random.default_rng(seed), [], set(), []

    def acquire(self, gate_up: int, experts: np.ndarray) -> int:
        assert not self.held, "the last ones were not released"
        self.asked |= set(experts.tolist())
        self.rng.shuffle(experts)
        count = int(self.rng.integers(1, len(experts) + 1))
        self.held = experts[:count].tolist()
        self.log.append((gate_up, tuple(self.held)))
        return count

    def release(self, gate_up: int, experts: np.ndarray) -> None:
        assert self.log[-1] == (gate_up, tuple(experts.tolist())) and self.held
        self.held = []


def opened(model: bytes, path: Path, source=None) -> tuple[ort.InferenceSession, LibrarySession]:
    """A session over the library, and what the library knows of it."""
    options, kernels = ort.SessionOptions(), LibrarySession(path, as_source(source) if source else None)
    options.log_severity_level, options.intra_op_num_threads = 4, 2
    kernels.register(options)
    return ort.InferenceSession(model, options, providers=[CPU]), kernels


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("tokens", [3, 90])
def test_any_grouping_gives_the_same_bits(kind, tokens):
    feeds = case(kind, tokens, 4, 9, 96, 64)
    want = helpers.run(built(), kind, feeds)
    source = Source()
    session, _ = opened(helpers.model(kind), built(), source)
    values = {name: on_onnxruntime(array) for name, array in feeds.items()}
    weights = values["gate_up"]  # its address names the layer
    needed = set(feeds["expert_ids"].ravel().tolist()) - {-1}
    for _ in range(8):
        source.log.clear()
        np.testing.assert_array_equal(session.run_with_ort_values(None, values)[0].numpy(), want)
        assert not source.held and {gate_up for gate_up, _ in source.log} == {weights.data_ptr()}
        assert sorted(expert for _, held in source.log for expert in held) == sorted(needed)
    assert source.asked == needed
    assert not source.failures


def test_nobody_is_asked_for_no_expert():
    feeds, source = case("float", 5, 2, 4, 32, 24), Source()
    feeds["expert_ids"][:] = -1
    assert not opened(helpers.model("float"), built(), source)[0].run(None, feeds)[0].any() and not source.log


class Failing(Source):
    """Gives up at the second question."""

    def acquire(self, gate_up: int, experts: np.ndarray) -> int:
        if self.log:
            raise KeyError("no more")
        super().acquire(gate_up, experts)
        return 1

    def release(self, gate_up: int, experts: np.ndarray) -> None:
        assert len(experts) == 1
        self.held = []


def test_a_source_that_gives_up():
    """The op fails, what was acquired has been released; the next run begins anew."""
    source = Failing()
    feeds = case("float", 12, 2, 6, 32, 24)
    session, _ = opened(helpers.model("float"), built(), source)
    for _ in range(2):
        source.log.clear()
        with pytest.raises(Exception, match=r"DmoeExperts: the expert source gave up\."):
            session.run(None, feeds)
        assert not source.held and len(source.log) == 1
        assert isinstance(source.failures.pop(), KeyError) and not source.failures


@pytest.mark.parametrize(("answer", "change", "words"), [
    (lambda ids: 0, None, "gave up"), (lambda ids: -1, None, "gave up"), (lambda ids: len(ids) + 1, None, "gave up"),
    (lambda ids: 1, 17, "holds expert 17, which it was not asked for"),
    (lambda ids: 1, 0, "holds expert 0, which it was not asked for")], ids=["none", "less", "more", "strange", "twice"])
def test_a_source_that_answers_nonsense(answer, change, words):
    class Nonsense(Source):
        def acquire(self, gate_up: int, experts: np.ndarray) -> int:
            if change is not None:
                experts[0] = change
            self.held = [1]
            return answer(experts)

        def release(self, gate_up: int, experts: np.ndarray) -> None:
            self.held = []

    source, feeds = Nonsense(), case("float", 12, 2, 6, 32, 24)
    with pytest.raises(Exception, match=words):
        opened(helpers.model("float"), built(), source)[0].run(None, feeds)
    assert bool(source.held) == (change is None)  # who acquired nothing has nothing to give back


def test_no_weight_of_an_expert_that_is_not_held_is_read():
    """NaN in all others, put right as they are acquired."""
    feeds = case("float", 12, 2, 6, 32, 24)
    want = helpers.session(built(), "float").run(None, feeds)[0]
    whole, there = feeds["gate_up"].copy(), feeds["gate_up"]
    there[:] = np.nan

    class Filling(Source):
        def acquire(self, gate_up: int, experts: np.ndarray) -> int:
            count = super().acquire(gate_up, experts)
            there[self.held] = whole[self.held]
            return count

        def release(self, gate_up: int, experts: np.ndarray) -> None:
            there[experts] = np.nan
            super().release(gate_up, experts)

    session, _ = opened(helpers.model("float"), built(), Filling())
    values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
    assert values["gate_up"].data_ptr() == there.ctypes.data
    np.testing.assert_array_equal(session.run_with_ort_values(None, values)[0].numpy(), want)


def test_kernels_are_counted_by_session_and_op():
    sessions = [opened(helpers.model("float"), built()) for _ in range(2)]
    assert [[kernels.kernels(op) for op in ("DmoeExperts", "DmoeLinear", "DmoeBlockRoute", "Gemm")]
            for _, kernels in sessions] == [[1, 0, 0, 0]] * 2
    assert LibrarySession(built()).kernels("DmoeExperts") == 0
    assert opened(route_model(ROUTE), library())[1].kernels("DmoeBlockRoute") == 1


def test_a_library_that_asks_no_source_takes_none():
    with pytest.raises(AssertionError, match="asks no expert source"):
        LibrarySession(library(), as_source(Source()))


def test_an_address_that_is_no_session_s():
    for address in ("4096", "x", str(LibrarySession(library())._address)):
        options = ort.SessionOptions()
        options.add_session_config_entry("dmoe.session", address)
        with pytest.raises(Exception, match=f"dmoe.session is {address}, no session that dmoe_session_create"):
            options.register_custom_ops_library(str(built()))


def test_an_older_library(tmp_path):
    """It exports no sessions."""
    (tmp_path / "old.c").write_text("int RegisterCustomOps(void) { return 0; }")
    subprocess.run(["cc", "-shared", "-o", tmp_path / "libdmoe_cpu.so", tmp_path / "old.c"], check=True)
    with pytest.raises(MissingRequirementError, match=r"cannot use .*dmoe_session_create.*`make cpu-ops`"):
        LibrarySession(tmp_path / "libdmoe_cpu.so")


def test_sessions_may_end_in_any_order():
    """At the end of the process too."""
    script = f"""
import sys
sys.path[:0] = {sys.path!r}
import gc, test_library_session as t
pairs = [t.opened(t.helpers.model("float"), t.built(), t.Source(i)) for i in range(3)]
feeds = t.case("float", 12, 2, 6, 32, 24)
session, kernels = pairs.pop()
del pairs[0]
gc.collect()
kept = session, kernels, pairs
session.run(None, feeds)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=100)
