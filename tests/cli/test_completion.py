"""`dmoe-export completion`: what shells are told, and once in a real one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from dmoe_export.cli import MEMBERS, main
from dmoe_export.recipe import recipe_names


def offered(*words):
    """What is offered for the last of the words."""
    *before, incomplete = words
    return [(item.type, item.value) for item in ShellComplete(main, {}, "dmoe-export", "_X").get_completions(
        before, incomplete)]


@pytest.mark.parametrize(("words", "wanted"), [
    (("",), [("plain", name) for name in MEMBERS]),
    (("ge",), [("plain", "generate")]),
    (("bench", "s"), [("plain", "step"), ("plain", "serve")]),
    (("deploy", "k"), [("plain", "kubernetes")]),
    (("generate", "--prompt-"), [("plain", "--prompt-file"), ("plain", "--prompt-ids")]),
    (("generate", "b", "--cache", "d"), [("plain", "dual")]),
    (("generate", "b"), [("file", "b")]),
    (("export", "sam"), [("dir", "sam")]),
    (("build", "--recipe", ""), [*(("plain", name) for name in recipe_names()), ("file", "")]),
    (("completion", "z"), [("plain", "zsh")]),
], ids=lambda value: " ".join(value) if isinstance(value, tuple) else "")
def test_verbs_options_choices_files_and_recipes_are_offered(words, wanted):
    assert offered(*words) == wanted


@pytest.mark.parametrize(("shell", "word"), [("bash", "complete -o"), ("zsh", "compdef"), ("fish", "complete --no-f")])
def test_the_script_says_how_it_is_installed(shell, word):
    result = CliRunner().invoke(main, ["completion", shell])
    assert result.exit_code == 0 and word in result.stdout
    assert f"# Once: dmoe-export completion {shell} > ~/" in "\n".join(result.stdout.splitlines()[:2])
    assert (shell == "zsh") == result.stdout.startswith("#compdef dmoe-export\n")  # zsh looks at the first line alone


@pytest.mark.skipif(not shutil.which("bash"), reason="the system has no bash")
def test_bash_completes(tmp_path):
    (tmp_path / "dmoe-export").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m dmoe_export "$@"\n')
    (tmp_path / "dmoe-export").chmod(0o755)
    code = ("eval \"$(dmoe-export completion bash)\"; COMP_WORDS=(dmoe-export inspect --ver); COMP_CWORD=2; "
            "_dmoe_export_completion dmoe-export; echo \"${COMPREPLY[@]}\"")
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True,
                          env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert done.stdout == "--verify\n", done.stderr
