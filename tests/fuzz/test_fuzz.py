"""The fuzzer sees what it is there for: every kind of defect, made on purpose, gets its name."""

from __future__ import annotations

import ctypes
import gc
import random
import signal
import sys
import time
from pathlib import Path

import pytest

from dmoe_export.errors import CheckError, MissingRequirementError, RequestError

from . import child, mutate
from .__main__ import plan
from .case import Base, Case, Draw
from .targets import TARGETS
from .targets.command_line import SHARES, parameters
from .verdict import judge


def _raise(error):
    raise error


def _print(text):
    print(text, file=sys.stderr)
    return []


class Panic(BaseException):
    """As a library of another language raises it."""


CALLS = {
    "answered": lambda folder: [],
    "refused": lambda folder: _raise(RequestError("x is 1, it must be 2.")),
    "not finite": lambda folder: _raise(CheckError("The model computes NaN.")),
    "environment": lambda folder: _raise(MissingRequirementError("There is no GPU.")),
    "traceback": lambda folder: _raise(Panic("a panic")),
    "hang": lambda folder: time.sleep(60),
    "killed": lambda folder: signal.raise_signal(signal.SIGSEGV),
    "memory": lambda folder: ctypes.memset(ctypes.create_string_buffer(600 << 20), 1, 600 << 20) and [],
    "noise": lambda folder: _print("2026-01-01 [E:onnxruntime] something"),
    "sentences": lambda folder: _print("dmoe-export: This is wrong.") or _raise(RequestError("And that.")),
    "left behind": lambda folder: (folder / "out" / ".x.partial-1").touch() or _raise(RequestError("No.")),
    "elsewhere": lambda folder: (folder.parent / "canary" / "file").unlink() or [],
    "unforeseen": lambda folder: _raise(CheckError("Something else.")),
}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The verdict on a call, run as a case."""
    (tmp_path / "base").mkdir()
    gc.collect()  # what earlier tests left would leave the child too, after it was counted
    monkeypatch.setattr("fuzz.verdict.BYTES", child.memory_of_this_process() + (200 << 20))

    def verdict(call, **more):
        monkeypatch.setitem(
            TARGETS, "Python face", (lambda rng, base, folder: Case("", [], lambda: call(folder), **more), 1)
        )
        runner = child.Runner(tmp_path / "work", Base(tmp_path / "base"), seed=0)
        return judge(runner.run("Python face", 0)).name

    return verdict


@pytest.mark.parametrize("name", CALLS)
def test_each_outcome_has_its_name(run, name, monkeypatch):
    if name == "hang":
        monkeypatch.setattr(child, "SECONDS", 2)
    assert run(CALLS[name]) == name


def test_an_answer_that_must_not_be_is_a_defect(run):
    assert run(CALLS["answered"], must_refuse=True) == "silently wrong"
    assert run(CALLS["refused"], must_refuse=True) == "refused"


def test_every_verb_has_options_to_fuzz():
    for verb in SHARES:
        assert {one.name for one in parameters(verb)} & {"bundle", "checkpoint", "source"}, verb


def test_cases_are_spread_and_the_same_every_time():
    first = plan(120, [])
    assert first == plan(120, []) and {target for target, _ in first[:60]} == set(TARGETS)
    for whole in ({"a": [1, {"b": 2}], "c": "x"}, {}):
        changed = [[mutate.tree(Draw(seed, "t", 3), whole)[1] for seed in range(20)] for _ in range(2)]
        assert changed[0] == changed[1]


def test_other_dress_is_the_same_json():
    import json

    whole = {"a": [1, 2.5, None], "b": {"c": "é"}}
    assert all(json.loads(mutate.same(random.Random(seed), whole)) == whole for seed in range(20))


def test_bytes_are_changed():
    old = Path(__file__).read_bytes()
    assert sum(mutate.raw(random.Random(seed), old)[0] != old for seed in range(50)) > 40
