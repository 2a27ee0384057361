"""Ctrl-C during a build: TensorRT swallows what callbacks raise, so the signal waits and the monitor ends the build."""

from __future__ import annotations

import os
import signal
import types

import pytest

from dmoe_export.engine.callbacks import make_monitor, signals_kept


class _Base:
    def __init__(self) -> None:
        """As TensorRT's."""


TRT = types.SimpleNamespace(IProgressMonitor=_Base)


@pytest.fixture
def ctrl_c():
    """As in a terminal, whatever nohup or a shell's `&` made of it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_ends_the_build_and_is_raised_after_it():
    told = []
    reached_the_end = False
    with pytest.raises(KeyboardInterrupt), signals_kept() as stopped:
        monitor = make_monitor(TRT, lambda *what: told.append(what), stopped)
        monitor.phase_start("build", None, 9)
        assert monitor.step_complete("build", 0)
        os.kill(os.getpid(), signal.SIGINT)
        assert not monitor.step_complete("build", 1)  # false means: stop
        reached_the_end = True
        raise ValueError("what the builder says of a build that was stopped")
    assert reached_the_end and told == [("build", 0, 9), ("build", 1, 9), ("build", 2, 9)]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_without_a_signal_nothing_changes():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError), signals_kept() as stopped:
        assert make_monitor(TRT, None, stopped).step_complete("build", 1)
        raise ValueError
    assert signal.getsignal(signal.SIGTERM) is before
