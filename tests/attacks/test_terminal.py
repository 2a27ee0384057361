"""Strangers' text in what the package logs steers no terminal (names and tables: tests/cli/test_cli.py)."""

from __future__ import annotations

import logging

from dmoe_export.cli.output import warnings_said


def test_what_is_logged_is_a_warning_of_one_line(capsys):
    with warnings_said():
        logging.getLogger("dmoe_export.text.codec").warning("Left out: %s.", "\x1b[2J\x07 \u202e \n x")
    said = capsys.readouterr().err
    assert said.startswith("dmoe-export: warning: Left out: \\x1b[2J") and said.count("\n") == 1
    assert not {"\x1b", "\x07", "\u202e"} & set(said)
    assert not logging.getLogger("dmoe_export").handlers
