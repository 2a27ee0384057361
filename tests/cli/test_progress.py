"""Signs of life: a moving bar in a terminal, a line now and then in a log, nothing for `--json`."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from dmoe_export.cli import progress


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.02)
    monkeypatch.setattr(progress, "stderr", Console(file=io.StringIO(), force_terminal=False))


def test_a_log_gets_a_line_now_and_then_even_where_nothing_is_reported(fast, capsys):
    with progress.byte_bar("read", 0) as report:
        report("trace", 0, 0)
        time.sleep(0.2)  # as one call that traces a graph
        report("weights", 1_500_000, 12_000_000_000)
        time.sleep(0.2)
    said = capsys.readouterr()
    assert said.out == "" and "dmoe-export: trace, 0 s so far\n" in said.err
    assert "dmoe-export: weights, 1.5 MB of 12.0 GB, 0 s so far\n" in said.err
    time.sleep(0.1)
    assert capsys.readouterr().err == ""  # it ends with the work


def test_steps_are_counted(fast, capsys):
    with progress.step_bar("check") as report:
        report("layers", 2, 20)
        time.sleep(0.2)
    assert "dmoe-export: check: layers, 2 of 20, 0 s so far\n" in capsys.readouterr().err


def test_short_work_and_json_say_nothing(monkeypatch, capsys):
    monkeypatch.setattr(progress, "stderr", Console(file=io.StringIO(), force_terminal=False))
    with progress.step_bar("check") as report:
        report("layers", 2, 20)
    monkeypatch.setattr(progress, "EVERY", 0.01)
    with progress.byte_bar("read", 0, shown=False) as report:
        report("trace", 0, 0)
        time.sleep(0.1)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_shows_that_time_goes_by(monkeypatch):
    written = io.StringIO()
    monkeypatch.setattr(progress, "stderr", Console(file=written, force_terminal=True, width=80))
    with progress.byte_bar("read", 0) as report:
        report("trace", 0, 0)
        time.sleep(0.5)
    frames = [frame for frame in written.getvalue().split("\r") if "trace" in frame]
    assert len(set(frames)) > 2  # the spinner turns and the bar pulses
