"""`generate --watch`: the show is on standard error, the answer on standard output as without it."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys

import pytest
from click.testing import CliRunner

from dmoe_export.cli import main

QUESTION = "what is 5 x 8?"
OPTIONS = ["--acceptance", "fixed", "--steps", "4", "--threads", "1", "--verify", "sizes"]


def generate(bundle, *more):
    result = CliRunner().invoke(main, ["generate", str(bundle.folder), "--prompt", QUESTION, *OPTIONS, *more])
    assert result.exit_code == 0, result.stderr
    return result


def test_a_pipe_gets_a_line_for_each_step(sample_bundle):
    alone, watched = generate(sample_bundle), generate(sample_bundle, "--watch")
    assert watched.stdout == alone.stdout
    lines = [line for line in watched.stderr.splitlines() if line.startswith("block ")]
    assert lines[0].startswith("block 1, step 1, ") and "░" in lines[0].translate(str.maketrans("▒▓", "░░"))
    assert lines[-1].endswith(f"| {alone.stdout.strip()}")
    passes = int(lines[-1].split("; ")[1].split()[0])
    assert f", {passes} forward pass" in alone.stderr and len(lines) > 1


def test_json_is_the_same_but_for_time(sample_bundle):
    watched = generate(sample_bundle, "--watch", "--json")
    assert watched.stdout.startswith('{"token_ids"') and watched.stdout.count("\n") == 1


def test_without_a_tokenizer_places_are_token_ids(tiny_bundle):
    result = CliRunner().invoke(main, ["generate", str(tiny_bundle.folder), "--prompt-ids", "5,6,7", "--max-new-tokens",
                                       "4", "--steps", "1", "--eos-id", "-1", "--watch", "--threads", "1"])
    assert result.exit_code == 0, result.stderr
    last = [line for line in result.stderr.splitlines() if line.startswith("block ")][-1]
    assert result.stdout.strip().endswith(last.partition("| ")[2].rstrip(","))


def test_stream_and_watch_are_refused_together(sample_bundle):
    result = CliRunner().invoke(main, ["generate", str(sample_bundle.folder), "--prompt", "x", "--watch", "--stream"])
    assert result.exit_code == 2
    assert "--watch and --stream both show an answer while it grows; give one of them." in result.stderr


@pytest.mark.parametrize("colour", [True, False])
def test_a_terminal_shows_places_and_is_clean_afterwards(sample_bundle, colour):
    """Standard error is a terminal, standard output a pipe, as in `answer=$(dmoe-export generate …)`."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"}
    environment |= {} if colour else {"NO_COLOR": "1"}
    command = [sys.executable, "-m", "dmoe_export", "generate", str(sample_bundle.folder), "--prompt", QUESTION,
               *OPTIONS, "--watch", "--watch-pause", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=environment) as process:
        os.close(theirs)
        shown = b""
        while select.select([ours], [], [], 60)[0]:
            try:
                got = os.read(ours, 1 << 16)
            except OSError:  # Linux: the other end is closed
                break
            if not got:
                break
            shown += got
        answer = process.stdout.read().decode()
    os.close(ours)
    said = shown.decode()
    assert process.returncode == 0 and answer == generate(sample_bundle).stdout
    assert "░" in said and "tokens per forward" in said and "experts of each layer" in said
    assert ("48;5;" in said or "48;2;" in said) is colour
    assert said.index("\x1b[?25l") < said.rindex("\x1b[?25h")  # the cursor is back
    assert "[eos: " in said.rpartition("\x1b[?25h")[2] or "[length: " in said.rpartition("\x1b[?25h")[2]
