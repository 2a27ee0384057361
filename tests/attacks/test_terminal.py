"""Strangers' text is part of what the command line prints, and must not steer a terminal, nor be taken for markup."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
from click.testing import CliRunner

from dmoe_export.cli import main
from dmoe_export.cli.output import answer_shown, say, visible, warnings_said

STEERING = "\x1b[2J\x1b]0;title\x07 [/x] [link=file:///x]y[/link] \u202e \n x"


def test_a_sentence_is_one_line(capsys):
    say(f"{STEERING} is \ud800 bad, é and 中 are not.")
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "\x1b" not in said and "\x07" not in said and "\u202e" not in said
    assert "\\x1b[2J" in said and "\\n x" in said and "é and 中 are" in said


def test_what_is_logged_is_a_warning(capsys):
    with warnings_said():
        logging.getLogger("dmoe_export.text.codec").warning("This is left out: %s.", STEERING)
    said = capsys.readouterr().err
    assert said.startswith("dmoe-export: warning: This is left out: \\x1b[2J") and said.count("\n") == 1
    assert not logging.getLogger("dmoe_export").handlers


def test_inspect_shows_names_as_they_are(tiny_bundle, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(tiny_bundle.folder, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["created_by"] = STEERING
    manifest["warnings"] = [STEERING]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    shown = CliRunner().invoke(main, ["inspect", str(folder)])
    assert shown.exit_code == 0 and "\x1b" not in shown.output and "\u202e" not in shown.output
    assert shown.output.count("\\x1b[2J") == 2 and shown.output.count("[/x] [link=file:///x]y[/link]") == 2


@pytest.mark.parametrize("terminal", [True, False])
def test_an_answer_is_raw_only_where_no_terminal_reads_it(monkeypatch, terminal):
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal, raising=False)
    text = "a\n\tb \x1b[2J"
    assert answer_shown(text) == ("a\n\tb \\x1b[2J" if terminal else text)
    assert visible("a\nb") == "a\\nb"
